"""Layers whose weight the model's own code reads instead of calling them.

Packed words are no numbers to that code, and their dtype none to cast inputs to; latent weights of
1-bit training would be used as the floats they are. T5 casts to ``self.wo.weight.dtype``, Mamba
multiplies by ``self.dt_proj.weight``, DETR adds ``self.query_position_embeddings.weight``, and many
a head computes ``x @ self.embed.weight.T``. They are found in the source of the methods.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType

from torch import nn

# What code may ask of a weight that neither its numbers nor their dtype are in.
_HARMLESS = {"device", "shape", "requires_grad", "requires_grad_", "size", "is_meta"}
# Methods that do not run when a model computes.
_BESIDE = ("__", "init", "_init", "reset", "tie", "_tie", "resize", "_resize", "set_", "prune")
# The fused kernels of PyTorch decline 1-bit layers, attention's projection is of a subclass, PEFT
# asks of what class a layer is, and what all models of transformers inherit runs beside forward.
_KNOWN = (
    "torch.nn.modules.transformer",
    "torch.nn.modules.activation",
    "transformers.modeling_utils",
    "transformers.generation",
    "peft.",
    "torch_onebit.",
)
# Read only where a product is split in the way of tensor parallel training, which is never set.
_NEVER = {("BloomAttention", ("dense",)), ("BloomMLP", ("dense_4h_to_h",))}

Path = tuple[str, ...]  # of a layer, from the module whose method it is in; "*" is any name


def readers(model: nn.Module) -> dict[int, str]:
    """The class that reads a layer, by the identity of the layer, for every layer that one does."""
    found: dict[int, str] = {}
    modules = list(model.modules())
    for module in modules:
        for path in _read(type(module)) - {()}:
            for layer in _reached(module, path):
                found.setdefault(id(layer), type(module).__name__)
    others = [type(module).__name__ for module in modules if () in _read(type(module))]
    for module in modules if others else ():
        for path in _handed_on(type(module)):
            for layer in _reached(module, path):
                found.setdefault(id(layer), others[0])
    return found


def _reached(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    if not path:
        yield module
        return
    name, *rest = path
    for key, child in module._modules.items():
        if child is not None and name in (key, "*"):
            yield from _reached(child, tuple(rest))


@cache
def _read(kind: type[nn.Module]) -> frozenset[Path]:
    """Layers whose weight methods of a class read; () where that is one they are called with."""
    read: set[Path] = set()
    for name, method in _methods(kind):
        if _mentions_weight(method.__code__):
            read |= {path for path in _Method(method).read if (name, path) not in _NEVER}
    return frozenset(read)


@cache
def _handed_on(kind: type[nn.Module]) -> frozenset[Path]:
    """Layers that methods of a class call others with."""
    return frozenset().union(*(_Method(method).handed_on for _, method in _methods(kind)))


def _methods(kind: type[nn.Module]) -> Iterator[tuple[str, FunctionType]]:
    """What runs when a module of a class computes, with the name of the class that has it."""
    overridden: set[str] = set()
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if owner.__module__.startswith(_KNOWN):
            continue
        for name, value in vars(owner).items():
            method = value.fget if isinstance(value, property) else inspect.unwrap(value)
            if not isinstance(method, FunctionType) or name.startswith(_BESIDE):
                continue
            if name not in overridden:
                yield owner.__name__, method
            if "super" not in method.__code__.co_names:
                overridden.add(name)


def _mentions_weight(code: CodeType) -> bool:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return "weight" in code.co_names or any(map(_mentions_weight, inner))


class _Method(ast.NodeVisitor):
    """What one method does with layers."""

    def __init__(self, method: FunctionType) -> None:
        self.read: set[Path] = set()
        self.handed_on: set[Path] = set()
        code = method.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self.known: dict[str, Path] = dict.fromkeys(names[:1], ())  # variables that are modules
        self.arguments = set(names[1:])
        try:
            tree = ast.parse("if True:\n" + textwrap.indent(inspect.getsource(method), " "))
        except (OSError, TypeError, SyntaxError):  # no source: what it names, it may read
            self.read = {(name,) for name in code.co_names}
            return
        self.visit(tree)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        path = self._path(node.value)
        for target in node.targets:
            if path is not None and isinstance(target, ast.Name):
                self.known[target.id] = path

    def visit_For(self, node: ast.For) -> None:
        path = self._path(node.iter)
        if path is not None and isinstance(node.target, ast.Name):
            self.known[node.target.id] = (*path, "*")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr", "type"):
            return
        self.handed_on |= {path for value in values if (path := self._path(value))}
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        inner = node.value
        if isinstance(inner, ast.Attribute) and inner.attr == "weight" and node.attr in _HARMLESS:
            return
        if node.attr == "weight" and isinstance(node.ctx, ast.Load):
            path = self._path(inner)
            if path:
                self.read.add(path)
            elif isinstance(inner, ast.Name) and inner.id in self.arguments:
                self.read.add(())
        self.generic_visit(node)

    def _path(self, node: ast.AST) -> Path | None:
        """What an expression is, from the module; None where that is not known."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            path = self._path(node.value)
            return None if path is None else (*path, node.attr)
        if isinstance(node, ast.Subscript):
            path = self._path(node.value)
            index = node.slice.value if isinstance(node.slice, ast.Constant) else "*"
            return None if path is None else (*path, str(index))
        return None
