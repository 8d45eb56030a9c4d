"""Tokens of a preprocessed Metal source, with the place each came from."""

import re
from dataclasses import dataclass

_PATTERN = re.compile(
    r"""(?P<linemark>^[ \t]*\#[^\n]*)
    |(?P<space>\s+)
    |(?P<string>"(?:\\.|[^"\\\n])*")
    |(?P<char>'(?:\\.|[^'\\\n])*')
    |(?P<number>(?:0[xX][0-9a-fA-F']+|\d[\d']*\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?)\w*)
    |(?P<word>[A-Za-z_]\w*)
    |(?P<mark>::|->|<<=|>>=|<<|>>|<=|>=|==|!=|&&|\|\||\+\+|--|[-+*/%&|^]=|\.\.\.|.)""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)
LINEMARK = re.compile(r'\s*#\s*(?:line\s+)?(\d+)\s+"([^"]*)"')
CONTRACT_OFF = re.compile(r"\s*#pragma METAL fp contract\(off\)\s*$")
CLOSING = {"(": ")", "[": "]", "{": "}"}


class MslError(Exception):
    """The source is not legal MSL, or uses more of it than the emulator knows."""


@dataclass
class Token:
    kind: str
    text: str
    file: str
    line: int

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def blank(self) -> bool:
        return self.kind in ("space", "linemark")


def tokenize(source: str) -> list[Token]:
    tokens, file, line = [], "?", 1
    for match in _PATTERN.finditer(source):
        kind, text = match.lastgroup, match.group()
        tokens.append(Token(kind, text, file, line))
        if kind == "linemark" and (mark := LINEMARK.match(text)):
            line, file = int(mark.group(1)) - 1, mark.group(2)
        line += text.count("\n")
    return tokens


def text_of(tokens: list[Token]) -> str:
    return "".join(t.text for t in tokens)


def words_of(tokens: list[Token]) -> str:
    """The tokens with one space between them: a declaration to match or to print."""
    return " ".join(t.text for t in tokens if not t.blank)


def skip_blank(tokens: list[Token], i: int) -> int:
    while i < len(tokens) and tokens[i].blank:
        i += 1
    return i


def previous(tokens: list[Token], i: int) -> int:
    """Index of the last token before i that is not blank, or -1."""
    i -= 1
    while i >= 0 and tokens[i].blank:
        i -= 1
    return i


def closing(tokens: list[Token], i: int) -> int:
    """Index of the bracket that closes tokens[i]."""
    opener, depth = tokens[i].text, 0
    for j in range(i, len(tokens)):
        if tokens[j].text == opener:
            depth += 1
        elif tokens[j].text == CLOSING[opener]:
            depth -= 1
            if depth == 0:
                return j
    raise MslError(f"{tokens[i].place}: unbalanced {opener}")


def closing_angle(tokens: list[Token], i: int) -> int | None:
    """Index of the > that closes the template argument list at i, or None for a less-than."""
    depth = 0
    while i < len(tokens):
        text = tokens[i].text
        if text in CLOSING:
            i = closing(tokens, i)
        elif text == "<":
            depth += 1
        elif text in (">", ">>"):
            depth -= len(text)
            if depth <= 0:
                return i
        elif text == ";":
            return None
        i += 1
    return None


def split_commas(tokens: list[Token]) -> list[list[Token]]:
    parts, current, i = [], [], 0
    while i < len(tokens):
        text = tokens[i].text
        end = None
        if text in CLOSING:
            end = closing(tokens, i)
        elif text == "<":
            end = closing_angle(tokens, i)
        if end is not None:
            current += tokens[i : end + 1]
            i = end + 1
            continue
        if text == ",":
            parts.append(current)
            current = []
        else:
            current.append(tokens[i])
        i += 1
    if words_of(current):
        parts.append(current)
    return parts


def is_attribute(tokens: list[Token], i: int) -> bool:
    return tokens[i].text == "[" and i + 1 < len(tokens) and tokens[i + 1].text == "["


def take_attributes(tokens: list[Token]) -> tuple[dict[str, str | None], list[Token]]:
    """The [[name(argument)]] groups of a declaration, and the declaration without them."""
    attributes, rest, i = {}, [], 0
    while i < len(tokens):
        if not is_attribute(tokens, i):
            rest.append(tokens[i])
            i += 1
            continue
        end = closing(tokens, i)
        for part in split_commas(tokens[i + 2 : end - 1]):
            match = re.match(r"^\s*([\w:]+)\s*(?:\((.*)\))?\s*$", text_of(part), re.DOTALL)
            if not match:
                raise MslError(f"{tokens[i].place}: cannot read attribute {text_of(part)!r}")
            attributes[match.group(1)] = match.group(2)
        i = end + 1
    return attributes, rest
