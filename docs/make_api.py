"""Writes docs/api.md from the docstrings of everything that torch_onebit exports.

python docs/make_api.py
"""

import ast
import dataclasses
import inspect
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch_onebit  # noqa: E402

PAGE = ROOT / "docs" / "api.md"
OPENING = """# API

Everything that `import torch_onebit` gives, from its docstrings: `make docs` writes this page.
"""
# Heading: names in the order they are met.
GROUPS = {
    "Whole models": [
        "quantize_",
        "dequantize_",
        "calibrate_",
        "prepack_",
        "unprepack_",
        "compile_options",
        "symmetrize_",
    ],
    "Checkpoints": ["load_checkpoint", "save_checkpoint", "load_gguf", "export_gguf"],
    "Training": [
        "prepare_qat_",
        "convert_",
        "Distillation",
        "distillation_loss",
        "parameter_groups",
        "count_parameters",
        "ParameterCount",
        "thaw_levels_",
        "add_lora_",
        "thaw_lora_",
        "AveragedModel",
    ],
    "Layers": [
        "OneBitLinear",
        "OneBitEmbedding",
        "OneBitExperts",
        "OneBitStack",
        "QATLinear",
        "QATEmbedding",
        "QATExperts",
        "LoRALinear",
        "OneBitModule",
        "PrepackedLinear",
        "tie",
    ],
    "Reports and options": [
        "report",
        "Report",
        "LayerRow",
        "LeftRow",
        "CalibrationReport",
        "CalibrationOptions",
    ],
    "Operators": [
        "quantize",
        "dequantize",
        "qmm",
        "linear",
        "gather_qmm",
        "embedding",
        "affine_grad",
        "prepack",
        "unprepack",
        "qmm_prepacked",
    ],
    "One matrix": ["quantize_weight", "quantize_levels", "METHODS", "pack_bits", "unpack_bits"],
    "Export": ["onnx_translations"],
}


def groups() -> dict[str, list[str]]:
    """GROUPS, and a last one for exported names that no group has."""
    known = {name for names in GROUPS.values() for name in names}
    rest = sorted(set(torch_onebit.__all__) - known)
    found = {**GROUPS, **({"More": rest} if rest else {})}
    exported = set(torch_onebit.__all__)
    return {title: [n for n in names if n in exported] for title, names in found.items()}


def entry(name: str) -> str:
    """One name: its signature, its docstring, and the docstrings of its public methods."""
    value = getattr(torch_onebit, name)
    if not callable(value):
        return f"### {name}\n\n`{value!r}`"
    parts = [f"### {name}", signature(name, value), block(value)]
    if inspect.isclass(value):
        for method, function in vars(value).items():
            function = getattr(function, "__func__", function)
            if method.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
                continue
            parts += [signature(f"{name}.{method}", function), block(function)]
    return "\n\n".join(part for part in parts if part)


def signature(name: str, value: object) -> str:
    """As the source has it."""
    if inspect.isclass(value) and dataclasses.is_dataclass(value):  # its __init__ has no source
        fields = (
            f"{f.name}: {getattr(f.type, '__name__', f.type)}" for f in dataclasses.fields(value)
        )
        return f"```\n{name}({', '.join(fields)})\n```"
    function = vars(value).get("__init__") if inspect.isclass(value) else value
    if function is None:
        return ""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    arguments = definition.args
    for part in (arguments.posonlyargs, arguments.args):
        if part and part[0].arg in ("self", "cls"):
            del part[0]
    returns = f" -> {ast.unparse(definition.returns)}" if definition.returns else ""
    text = f"{name}({ast.unparse(arguments)}){'' if inspect.isclass(value) else returns}"
    return f"```\n{textwrap.fill(text, 100, subsequent_indent='    ')}\n```"


def block(value: object) -> str:
    """A docstring, as it stands: its sections are indented text."""
    text = inspect.getdoc(value) or ""
    return f"```text\n{text}\n```" if text else ""


def page() -> str:
    parts = [OPENING.strip()]
    for title, names in groups().items():
        parts += [f"## {title}", *(entry(name) for name in names)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE.relative_to(ROOT)}")
