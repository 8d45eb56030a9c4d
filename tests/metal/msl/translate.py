"""Turns a .metal file into C++ to run, or into C++ for OpenCL to check.

To run, address-space words go, `threadgroup` variables become references to memory the emulator
owns, and every host_name gets an entry function. To check, address spaces stay: msl_check.h maps
them to OpenCL's, whose rules are nearly Metal's.
"""

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .tokens import (
    CONTRACT_OFF,
    LINEMARK,
    MslError,
    Token,
    closing,
    closing_angle,
    is_attribute,
    previous,
    skip_blank,
    split_commas,
    take_attributes,
    text_of,
    tokenize,
    words_of,
)

ADDRESS_SPACES = {"device", "constant", "threadgroup", "thread"}
# Attribute -> does it take a vector type too?
BUILT_INS = {
    "thread_position_in_grid": True,
    "thread_position_in_threadgroup": True,
    "threadgroup_position_in_grid": True,
    "threads_per_threadgroup": True,
    "threadgroups_per_grid": True,
    "thread_index_in_threadgroup": False,
    "thread_index_in_simdgroup": False,
    "simdgroup_index_in_threadgroup": False,
    "simdgroups_per_threadgroup": False,
}
STDLIB = Path(__file__).parent.parent / "headers" / "metal"


@dataclass
class Parameter:
    attribute: str
    index: str | None
    declaration: str


@dataclass
class Kernel:
    parameters: list[Parameter]
    is_template: bool
    place: str


def preprocess(source: Path, include: list[Path], defines: tuple[str, ...] = ()) -> str:
    command = ["g++", "-E", "-x", "c++", "-undef", "-nostdinc", "-I", str(STDLIB)]
    command += [f"-I{d}" for d in include] + [f"-D{d}" for d in defines]
    command += ["-D__METAL_VERSION__=310", "-D__METAL__=1", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MslError(done.stderr)
    return done.stdout


class Translator:
    """One preprocessed source; `translate` fills kernels, instances, function_constants, errors."""

    def __init__(self, source: str, check: bool = False):
        self.tokens = tokenize(source)
        self.check = check
        self.kernels: dict[str, Kernel] = {}
        self.instances: list[tuple[str, str, str]] = []  # host_name, expression, place
        self.function_constants: list[tuple[str, str]] = []
        self.errors: list[str] = []
        self.contracts = True  # a * b + c may become a fused multiply-add
        self.variables = 0
        self.output: list[str] = []

    def error(self, token: Token, message: str) -> None:
        self.errors.append(f"{token.place}: {message}")

    def translate(self) -> str:
        tokens, scopes, i = self.tokens, [], 0
        kernel_follows = False
        while i < len(tokens):
            token = tokens[i]
            in_function = bool({"function", "kernel"} & set(scopes))
            if token.kind == "linemark" and CONTRACT_OFF.match(token.text):
                self.contract_off(token)
            if is_attribute(tokens, i):
                attributes, _ = take_attributes(tokens[i : closing(tokens, i) + 1])
                if not in_function and {"kernel", "host_name"} & attributes.keys():
                    i, kernel_follows = self.kernel_declaration(i)
                    continue
                self.attribute(i, attributes)
                i = closing(tokens, i) + 1
                continue
            if token.text == "threadgroup" and in_function:
                end = self.threadgroup_variable(i, scopes[-1])
                if end:
                    i = end
                    continue
            if token.text == "{":
                scopes.append("kernel" if kernel_follows else self.scope_kind())
                kernel_follows = False
            elif token.text == "}" and scopes:
                scopes.pop()
            if self.check and (end := self.construction(i)):
                i = end
                continue
            self.output.append(self.rewrite(token))
            i += 1
        return "".join(self.output)

    def contract_off(self, token: Token) -> None:
        """The pragma holds for what follows, but g++ is told for a whole file."""
        if self.kernels or re.search(r"\)\s*\{", "".join(self.output)):
            self.error(token, "fp contract(off) must precede every function")
        self.contracts = False

    def rewrite(self, token: Token) -> str:
        if token.kind == "linemark":  # without the nesting flags, which are wrong in a second pass
            mark = LINEMARK.match(token.text)
            return (
                f'#line {mark.group(1)} "{mark.group(2)}"' if mark and mark.group(1) != "0" else ""
            )
        if token.kind == "word" and token.text in ADDRESS_SPACES and not self.check:
            return ""
        # An unsuffixed literal is a float in MSL.
        if token.kind == "number" and not token.text.startswith(("0x", "0X")):
            if re.search(r"[.eE]", token.text) and not re.search(r"[fFhH]$", token.text):
                return token.text + "f"
            if token.text.endswith("h") and not self.check:
                return f"half({token.text[:-1]}f)"
        return token.text

    def construction(self, i: int) -> int | None:
        """`vec<T, 4>(` or `float4(` at i: writes construct<...> and returns the index of `(`."""
        tokens = self.tokens
        end = i
        if tokens[i].text == "vec" and tokens[skip_blank(tokens, i + 1)].text == "<":
            end = closing_angle(tokens, skip_blank(tokens, i + 1)) or i
        elif not re.fullmatch(r"(half|float|int|uint|ushort|ulong)[234]", tokens[i].text):
            return None
        after = skip_blank(tokens, end + 1)
        if tokens[after].text != "(":
            return None
        self.output.append(f"construct<{text_of(tokens[i : end + 1])}>")
        return after

    def scope_kind(self) -> str:
        """What the brace about to open begins, from the statement head before it."""
        head = ""
        for text in reversed(self.output):
            if text.strip() in (";", "{", "}") or text.lstrip().startswith("#"):
                break
            head = text + head
        if re.search(r"\bnamespace\b", head):
            return "namespace"
        if re.search(r"\b(struct|class|enum)\b", head) and not head.rstrip().endswith(")"):
            return "type"
        if re.search(r"\)\s*(const|thread|device|constant|\s)*$", head):
            return "function"
        return "block"

    def attribute(self, i: int, attributes: dict[str, str | None]) -> None:
        if "function_constant" in attributes:
            name = self.tokens[previous(self.tokens, i)].text
            self.function_constants.append((name, attributes["function_constant"].strip()))
            if self.check:
                self.output.append(" = 0")

    def preceding_word(self) -> str:
        return next((t for t in reversed(self.output) if t.strip()), "")

    def kernel_declaration(self, i: int) -> tuple[int, bool]:
        """Reads a kernel's head, or an explicit instantiation; returns what follows it."""
        tokens = self.tokens
        attributes = {}
        while is_attribute(tokens, i := skip_blank(tokens, i)):
            end = closing(tokens, i)
            attributes |= take_attributes(tokens[i : end + 1])[0]
            i = end + 1
        if self.preceding_word() == "template":
            return self.instantiation(i, attributes), False
        if tokens[i].text != "void":
            self.error(tokens[i], "a kernel must return void")
        name_at = skip_blank(tokens, i + 1)
        name = tokens[name_at].text
        open_at = skip_blank(tokens, name_at + 1)
        close_at = closing(tokens, open_at)
        parameters, texts = [], []
        for part in split_commas(tokens[open_at + 1 : close_at]):
            parameter, text = self.parameter(name, part)
            parameters += [parameter] if parameter else []
            texts.append(text)
        self.check_buffers(tokens[name_at], name, parameters)
        template = self.declares_template()
        self.kernels[name] = Kernel(parameters, template, tokens[name_at].place)
        if "host_name" in attributes:
            self.instances.append(
                (ast.literal_eval(attributes["host_name"]), name, tokens[i].place)
            )
        elif not template:
            self.instances.append((name, name, tokens[i].place))
        self.output.append(f"void {name}({', '.join(texts)})")
        return close_at + 1, True

    def declares_template(self) -> bool:
        head = ""
        for text in reversed(self.output):
            if text.strip() in (";", "}", "{") or text.lstrip().startswith("#"):
                break
            head = text + head
        return head.strip().startswith("template")

    def instantiation(self, i: int, attributes: dict[str, str | None]) -> int:
        """template [[host_name("x")]] [[kernel]] decltype(f<T>) f<T>;"""
        tokens, end = self.tokens, i
        while tokens[end].text != ";":
            end += 1
        if "host_name" not in attributes:
            self.error(tokens[i], "an explicit instantiation needs a host_name")
        elif tokens[i].text != "decltype":
            self.error(tokens[i], "write the signature once: decltype(kernel<T>) kernel<T>")
        else:
            start = closing(tokens, skip_blank(tokens, i + 1)) + 1
            expression = words_of(tokens[start:end])
            self.instances.append(
                (ast.literal_eval(attributes["host_name"]), expression, tokens[i].place)
            )
        while self.output.pop() != "template":
            pass
        return end + 1

    def parameter(self, kernel: str, tokens: list[Token]) -> tuple[Parameter | None, str]:
        attributes, rest = take_attributes(tokens)
        first = tokens[skip_blank(tokens, 0)]
        declaration = words_of(rest)
        text = "".join(self.rewrite(t) for t in rest)
        known = [a for a in attributes if a in BUILT_INS or a == "buffer"]
        if not known:
            self.error(first, f"kernel {kernel}: `{declaration}` has no binding attribute")
            return None, text
        attribute = known[0]
        if attribute == "buffer":
            if not re.search(r"\b(device|constant)\b", declaration):
                self.error(first, f"kernel {kernel}: buffer `{declaration}` needs an address space")
            if "*" not in declaration and "&" not in declaration:
                self.error(first, f"kernel {kernel}: buffer `{declaration}` is not a pointer")
        else:
            allowed = r"(uint|ushort)[23]?" if BUILT_INS[attribute] else r"(uint|ushort)"
            if not re.match(rf"^{allowed} \w+$", declaration):
                self.error(first, f"kernel {kernel}: `{declaration}` cannot be [[{attribute}]]")
        return Parameter(attribute, attributes[attribute], declaration), text

    def check_buffers(self, token: Token, name: str, parameters: list[Parameter]) -> None:
        indices = [int(p.index) for p in parameters if p.attribute == "buffer"]
        if len(set(indices)) != len(indices):
            self.error(token, f"kernel {name}: a buffer index is used twice")
        if any(i > 30 for i in indices):
            self.error(token, f"kernel {name}: buffer indices end at 30")

    def threadgroup_variable(self, i: int, scope: str) -> int | None:
        """`threadgroup T name[n];` in a function; None for a pointer or reference to one."""
        tokens = self.tokens
        if not re.search(r"[;{}]$", self.preceding_word().rstrip() or ";"):
            return None
        end = i
        while tokens[end].text != ";":
            end = closing(tokens, end) + 1 if tokens[end].text in "([{" else end + 1
        declaration = text_of(tokens[i + 1 : end])
        match = re.match(r"^\s*([\w:<>, ]+?)\s+(\w+)\s*((?:\[[^\]]*\])*)\s*(=.*)?$", declaration)
        if not match:
            return None
        element, name, extent, initializer = match.groups()
        if initializer:
            self.error(tokens[i], "a threadgroup variable cannot have an initializer")
        if scope != "kernel":
            self.error(
                tokens[i], "a threadgroup variable must be declared in the kernel's own scope"
            )
        self.variables += 1
        key = f"ThreadgroupVariable{self.variables}"
        if self.check:
            self.output.append(
                f"typedef {element} {key}{extent}; "
                f"threadgroup {key}& {name} = *(threadgroup {key}*)(threadgroup void*)0;"
            )
        else:
            self.output.append(
                f"struct {key}; "
                f'auto& {name} = ::emu::threadgroup<{key}, {element}{extent}>("{name}");'
            )
        return end + 1


def calls(unit: Translator) -> Iterator[tuple[str, Kernel, str]]:
    """Of every instance its host_name, its kernel and the call that binds its arguments."""
    seen: dict[str, str] = {}
    for host_name, expression, place in unit.instances:
        if host_name in seen:
            unit.errors.append(f'{place}: host_name "{host_name}" is used at {seen[host_name]}')
        seen[host_name] = place
        base = re.match(r"\w+", expression).group()
        if base not in unit.kernels:
            unit.errors.append(f"{place}: instantiation of {base}, which is no kernel")
            continue
        kernel = unit.kernels[base]
        sources = [
            f"emu::BufferIndex{{{p.index}}}" if p.attribute == "buffer" else _built_in(p.attribute)
            for p in kernel.parameters
        ]
        yield host_name, kernel, f"emu::call({', '.join([f'&{expression}', *sources])});"


def entries(unit: Translator) -> str:
    """The tables that let the emulator find kernels and function constants by name."""
    lines, table = [], []
    for number, (host_name, kernel, call) in enumerate(calls(unit)):
        lines.append(f"static void emu_entry_{number}() {{ {call} }}")
        declared = [p.index for p in kernel.parameters if p.attribute == "buffer"]
        mask = sum(1 << int(index) for index in declared)
        table.append(f'{{"{host_name}", emu_entry_{number}, {mask}u}}')
    constants = [f"{{{index}, &{name}, sizeof({name})}}" for name, index in unit.function_constants]
    lines.append(_table("KernelEntry emu_kernels", [*table, "{nullptr, nullptr, 0}"]))
    lines.append(
        _table("FunctionConstant emu_function_constants", [*constants, "{-1, nullptr, 0}"])
    )
    return "\n".join(lines) + "\n"


def _built_in(attribute: str) -> str:
    return "emu::BuiltIn::k" + "".join(word.capitalize() for word in attribute.split("_"))


def _table(declaration: str, rows: list[str]) -> str:
    return f'extern "C" const emu::{declaration}[] = {{\n  ' + ",\n  ".join(rows) + "};"
