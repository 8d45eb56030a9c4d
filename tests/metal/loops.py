"""What registers demand of loops and of simdgroup matrices.

A loop whose variable indexes an array or a vector in registers must be unrolled, for registers have
no addresses: else the array goes to memory. A loop whose length is known at run time only, over the
words of a row, must not: its body is long, and repeats.
"""

import math
import re
from dataclasses import dataclass

from msl.tokens import Token, closing, previous, skip_blank, words_of

UNROLL = re.compile(r"#pragma clang loop unroll\(full\)")
# More float sums of 8 x 8 than this, two registers each, and a simdgroup's share of the registers
# is so large that few simdgroups run (ggml-org/llama.cpp #10982).
MOST_SUMS = 8
CONSTANT = re.compile(r"k[A-Z]\w*|\d\w*")


@dataclass
class Loop:
    start: int  # of `for`
    body: int
    end: int
    variable: str
    condition: list[Token]
    unrolled: bool


@dataclass
class Function:
    start: int  # of its parameters
    body: int
    end: int
    constants: set[str]  # template parameters that are numbers


def statement_end(tokens: list[Token], i: int) -> int:
    """Index of the last token of the statement that starts at i."""
    i = skip_blank(tokens, i)
    if tokens[i].text == "{":
        return closing(tokens, i)
    if tokens[i].text in ("for", "if", "while"):
        end = statement_end(tokens, closing(tokens, skip_blank(tokens, i + 1)) + 1)
        after = skip_blank(tokens, end + 1)
        return statement_end(tokens, after + 1) if tokens[after].text == "else" else end
    while tokens[i].text != ";":
        i = closing(tokens, i) + 1 if tokens[i].text in "([{" else i + 1
    return i


def is_unrolled(tokens: list[Token], i: int) -> bool:
    """Does the pragma stand before the loop at i?"""
    i -= 1
    while i >= 0 and tokens[i].blank:
        if UNROLL.search(tokens[i].text):
            return True
        i -= 1
    return False


def loops_of(tokens: list[Token], function: Function) -> list[Loop]:
    loops = []
    for i in range(function.body, function.end):
        if tokens[i].text != "for":
            continue
        head = skip_blank(tokens, i + 1)
        close = closing(tokens, head)
        parts, part = [], []
        for token in tokens[head + 1 : close]:
            if token.text == ";":
                parts.append(part)
                part = []
            else:
                part.append(token)
        name = re.search(r"(\w+) =", words_of(parts[0]))
        if name is None:
            continue
        end = statement_end(tokens, close + 1)
        loops.append(
            Loop(i, close + 1, end, name.group(1), parts[0] + parts[1], is_unrolled(tokens, i))
        )
    return loops


def functions_of(tokens: list[Token]) -> list[Function]:
    """Every body that follows a parameter list."""
    found, i, template = [], 0, set()
    while i < len(tokens):
        text = tokens[i].text
        if text == "template":
            open_at = skip_blank(tokens, i + 1)
            if tokens[open_at].text == "<":
                end = next(j for j in range(open_at, len(tokens)) if tokens[j].text == ">")
                template = set(re.findall(r"uint (\w+)", words_of(tokens[open_at:end])))
        if text == "(":
            close = closing(tokens, i)
            after = skip_blank(tokens, close + 1)
            if after < len(tokens) and tokens[after].text == "{":
                end = closing(tokens, after)
                found.append(Function(i, after, end, template))
                i = end
            else:
                i = close
        elif text == ";":
            template = set()
        i += 1
    return found


def declarations(tokens: list[Token]) -> list[str]:
    """The pieces between `;`, `,`, brackets of calls and braces, each as text."""
    pieces, piece = [], []
    for token in tokens:
        if token.text in (";", ",", "(", ")", "{", "}"):
            pieces.append(words_of(piece))
            piece = []
        else:
            piece.append(token)
    return pieces


def memory_names(tokens: list[Token]) -> set[str]:
    """Names declared as pointers to, or arrays in, an address space that has addresses."""
    names = set()
    for piece in declarations(tokens):
        if not re.search(r"\b(device|constant|threadgroup)\b", piece):
            continue
        declared = re.search(r"^[^[]*?[*&] (\w+)", piece) or re.search(r"(\w+) \[", piece)
        if declared:
            names.add(declared.group(1))
    return names


def register_indices(tokens: list[Token], loop: Loop, memory: set[str]) -> list[Token]:
    """Uses of the loop's variable, or of what is made from it, to index what is no memory."""
    tainted, found = {loop.variable}, []
    body = range(loop.body, loop.end + 1)
    for i in body:
        if tokens[i].text == "=" and tokens[previous(tokens, i)].kind == "word":
            end = statement_end(tokens, i)
            name = previous(tokens, i)
            declares = tokens[previous(tokens, name)].text in ("uint", "int", "ushort")
            if declares and tainted & {t.text for t in tokens[i:end]}:
                tainted.add(tokens[name].text)
    for i in body:
        before = tokens[i]
        if before.kind != "word" or before.text in memory:
            continue
        at = skip_blank(tokens, i + 1)
        while tokens[at].text == "[" and tokens[at + 1].text != "[":
            end = closing(tokens, at)
            if tainted & {t.text for t in tokens[at:end]}:
                found.append(before)
            at = skip_blank(tokens, end + 1)
    return found


def is_constant(loop: Loop, constants: set[str]) -> bool:
    if re.search(r"< \w+ \. get_capacity \( \)$", words_of(loop.condition)):
        return True  # elements of a cooperative tensor: the compiler knows how many
    words = {t.text for t in loop.condition if t.kind in ("word", "number")}
    words -= {loop.variable, "uint", "int", "ushort", *constants}
    return all(CONSTANT.fullmatch(w) for w in words)


def sums_of(tokens: list[Token], constants: set[str]) -> int:
    """Float matrices that one statement declares; an extent that is a template parameter is 4."""
    words = words_of(tokens)
    declared = re.match(r"(?:simdgroup_float8x8|simdgroup_matrix < float , 8 , 8 >) (\w.*)", words)
    if not declared:
        return 0
    total = 0
    for name in re.sub(r"=.*", "", declared.group(1)).split(" , "):
        total += math.prod(
            4 if e in constants else int(e) for e in re.findall(r"\[ (\w+) \]", name)
        )
    return total


def too_many_sums(tokens: list[Token], function: Function, loops: list[Loop]) -> list[str]:
    """Those that live from one step to the next: declared outside the loops over words."""
    steps = [loop for loop in loops if not loop.unrolled]
    count, statement, place = 0, [], ""
    for i in range(function.body + 1, function.end):
        if tokens[i].blank:
            continue
        if tokens[i].text not in (";", "{", "}"):
            statement.append(tokens[i])
            continue
        inside = any(loop.body <= i <= loop.end for loop in steps)
        if not inside and (more := sums_of(statement, function.constants)):
            count += more
            place = statement[0].place
        statement = []
    if not steps or count <= MOST_SUMS:
        return []
    return [f"{place}: error: {count} matrices of float sums, at most {MOST_SUMS} fit"]


def check(tokens: list[Token]) -> list[str]:
    errors, functions = [], functions_of(tokens)
    bodies = [range(f.start, f.end + 1) for f in functions]
    fields = memory_names([t for i, t in enumerate(tokens) if not any(i in b for b in bodies)])
    for function in functions:
        memory = fields | memory_names(tokens[function.start : function.end])
        loops = loops_of(tokens, function)
        for loop in loops:
            place = tokens[loop.start].place
            used = register_indices(tokens, loop, memory)
            if used and not loop.unrolled:
                errors.append(f"{place}: error: the loop indexes `{used[0].text}`: unroll it")
            if loop.unrolled and not is_constant(loop, function.constants):
                errors.append(f"{place}: error: unrolled, but its length is not constant")
        errors += too_many_sums(tokens, function, loops)
    return errors
