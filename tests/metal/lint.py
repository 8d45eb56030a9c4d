"""Rejects what Apple's Metal compiler would: token rules, then clang under address-space rules."""

import re
import subprocess
import tempfile
from pathlib import Path

import loops
import toolchain
from msl.tokens import MslError, Token, previous, skip_blank
from msl.translate import Translator, entries, preprocess

CHECK_HEADER = toolchain.HERE / "headers" / "msl_check.h"
# fp64 is a "feature" clang insists on for this target; double itself is a token rule below.
EXTENSIONS = (
    "-cl-ext=+cl_khr_fp16,-cl_khr_fp64,-__opencl_c_fp64,-__opencl_c_device_enqueue,"
    "-__opencl_c_program_scope_global_variables"
)
FORBIDDEN = {
    *("asm", "catch", "delete", "double", "dynamic_cast", "goto", "new", "noexcept", "std"),
    *("thread_local", "throw", "try", "typeid", "virtual"),
}


def clang(source: Path) -> list[str]:
    command = [toolchain.zig(), "clang", "-cc1", "-triple", "x86_64-unknown-linux-gnu"]
    command += ["-x", "clcpp", "-cl-std=clc++2021", EXTENSIONS, "-fsyntax-only"]
    # A non-void function without a return, an uninitialised local: undefined on a GPU too.
    command += ["-Wreturn-type", "-Werror=return-type", "-Wsometimes-uninitialized"]
    command += ["-Werror=uninitialized", "-Werror=sometimes-uninitialized", "-ferror-limit", "0"]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if re.search(r"\berror:", line)]
    if done.returncode and not errors:
        errors.append(done.stderr)
    return errors


def lint(source: Path, include: list[Path] = ()) -> list[str]:
    """The reasons to reject `source`; empty when there are none."""
    try:
        unit = Translator(preprocess(source, list(include)), check=True)
        body = unit.translate()
        entries(unit)
    except MslError as error:
        return [str(error)]
    errors = unit.errors + forbidden_words(unit.tokens) + recursion(unit.tokens)
    errors += program_scope(unit.tokens) + unqualified_pointers(unit.tokens)
    errors += loops.check(unit.tokens)
    # Instances make clang look into the bodies of templates.
    templates = [e for _, e, _ in unit.instances if "<" in e]
    body += "\n" + "".join(f"template decltype({e}) {e};\n" for e in templates)
    with tempfile.TemporaryDirectory() as folder:
        check = Path(folder) / "check.clcpp"
        check.write_text(f'#include "{CHECK_HEADER}"\n{body}')
        errors += clang(check)
    return errors


def forbidden_words(tokens: list[Token]) -> list[str]:
    errors = []
    for i, token in enumerate(tokens):
        if token.kind != "word":
            continue
        if token.text in FORBIDDEN:
            errors.append(f"{token.place}: error: `{token.text}` is not available in MSL")
        following = tokens[skip_blank(tokens, i + 1)] if i + 1 < len(tokens) else token
        if token.text == "long" and following.text == "long":
            errors.append(f"{token.place}: error: `long long` is not available in MSL")
    return errors


def program_scope(tokens: list[Token]) -> list[str]:
    """A variable of the program must be in the constant address space."""
    errors, depth, statement = [], 0, []
    for token in tokens:
        if token.blank:
            continue
        if token.text == "{":
            opens_namespace = any(t.text == "namespace" for t in statement)
            depth += 0 if opens_namespace else 1
            statement = statement if depth else []
        elif token.text == "}":
            depth = max(depth - 1, 0)
            statement = []
        elif token.text == ";" and depth == 0:
            words = [t.text for t in statement]
            if "constexpr" in words or (words and words[0] in ("const", "static")):
                if "constant" not in words and "(" not in words:
                    name = statement[0]
                    errors.append(f"{name.place}: error: `{' '.join(words)}` needs `constant`")
            statement = []
        elif depth == 0:
            statement.append(token)
    return errors


_TYPE = r"(?:const )?(?:\w+|vec < \w+ , \d >|\w+ < \w+ >)"
_POINTER = re.compile(rf"^{_TYPE} [*&] (?:const )?\w+( \[.*)?( =.*)?$")


def unqualified_pointers(tokens: list[Token]) -> list[str]:
    """Pointers and references without an address space, where clang takes the generic one."""
    errors, statement = [], []
    for token in tokens:
        if token.blank:
            continue
        if token.text in (";", "{", "}", "(", ",", ")"):
            words = " ".join(t.text for t in statement)
            space = {"device", "constant", "thread", "threadgroup"} & {t.text for t in statement}
            is_expression = words.startswith("return ") or "<=" in words
            if _POINTER.match(words) and not space and not is_expression:
                # `a * b` as an argument reads like a declaration: types start a statement here
                if token.text == ";" or _names_type(statement):
                    place = statement[0].place
                    errors.append(f"{place}: error: `{words}` must name an address space")
            statement = []
        else:
            statement.append(token)
    return errors


def _names_type(statement: list[Token]) -> bool:
    first = next(t.text for t in statement if t.text != "const")
    scalars = {"T", "bool", "float", "half", "bfloat", "int", "uint", "long", "ulong", "ushort"}
    return first in scalars or (first[0].isupper() and len(first) > 1)


def recursion(tokens: list[Token]) -> list[str]:
    """Functions that reach themselves, by name: MSL has no call stack."""
    calls: dict[str, set[str]] = {}
    places: dict[str, str] = {}
    current, depth, parens = None, 0, 0
    last_call = None
    for i, token in enumerate(tokens):
        if token.blank:
            continue
        parens += {"(": 1, ")": -1}.get(token.text, 0)
        if token.text == "(" and parens == 1 and depth == 0:
            name = tokens[previous(tokens, i)]
            last_call = name.text if name.kind == "word" else None
            places.setdefault(last_call or "", name.place)
        elif token.text == "(" and current:
            calls[current].add(tokens[previous(tokens, i)].text)
        elif token.text == "{":
            before = tokens[previous(tokens, i)].text
            if depth == 0 and before == ")" and last_call:
                current = last_call
                calls.setdefault(current, set())
            depth += 1 if current else 0
        elif token.text == "}" and current:
            depth -= 1
            current = current if depth else None
    return [
        f"{places[name]}: error: `{name}` is recursive, which MSL does not allow"
        for name in calls
        if name in _reachable(calls, name)
    ]


def _reachable(calls: dict[str, set[str]], start: str) -> set[str]:
    found, queue = set(), [start]
    while queue:
        for callee in calls.get(queue.pop(), ()):
            if callee in calls and callee not in found:
                found.add(callee)
                queue.append(callee)
    return found
