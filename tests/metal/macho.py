"""Reads what a 64-bit Mach-O file exports and what it leaves undefined."""

import struct
from collections.abc import Iterator

_SYMTAB, _DYLD_INFO, _DYLD_INFO_ONLY, _EXPORTS_TRIE = 0x2, 0x22, 0x80000022, 0x80000033
_EXTERNAL, _UNDEFINED = 0x01, 0x00


def _commands(data: bytes) -> Iterator[tuple[int, int]]:
    """(command, offset) of every load command."""
    magic, count = struct.unpack_from("<I12xI", data)
    if magic != 0xFEEDFACF:
        raise ValueError(f"a 64-bit Mach-O file must start with 0xfeedfacf, got {magic:#x}")
    offset = 32
    for _ in range(count):
        command, size = struct.unpack_from("<II", data, offset)
        yield command, offset
        offset += size


def exports(data: bytes) -> set[str]:
    for command, offset in _commands(data):
        if command in (_DYLD_INFO, _DYLD_INFO_ONLY):
            begin, size = struct.unpack_from("<II", data, offset + 40)
        elif command == _EXPORTS_TRIE:
            begin, size = struct.unpack_from("<II", data, offset + 8)
        else:
            continue
        if size:
            return set(_trie(data[begin : begin + size]))
    return set()


def _uleb(trie: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = trie[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _trie(trie: bytes) -> Iterator[str]:
    stack = [(0, b"")]
    while stack:
        at, name = stack.pop()
        size, at = _uleb(trie, at)
        if size:
            yield name.decode()
        at += size
        children = trie[at]
        at += 1
        for _ in range(children):
            end = trie.index(b"\0", at)
            child, after = _uleb(trie, end + 1)
            stack.append((child, name + trie[at:end]))
            at = after


def undefined(data: bytes) -> set[str]:
    """External symbols that an object file needs from elsewhere."""
    names = set()
    for command, offset in _commands(data):
        if command != _SYMTAB:
            continue
        symbols, count, strings, _ = struct.unpack_from("<IIII", data, offset + 8)
        for i in range(count):
            at, kind, section = struct.unpack_from("<IBB", data, symbols + 16 * i)
            if kind & _EXTERNAL and kind & 0x0E == _UNDEFINED and section == 0:
                begin = strings + at
                names.add(data[begin : data.index(b"\0", begin)].decode())
    return names


def defined(data: bytes) -> set[str]:
    """External symbols that an object file brings."""
    names = set()
    for command, offset in _commands(data):
        if command != _SYMTAB:
            continue
        symbols, count, strings, _ = struct.unpack_from("<IIII", data, offset + 8)
        for i in range(count):
            at, kind, section = struct.unpack_from("<IBB", data, symbols + 16 * i)
            if kind & _EXTERNAL and section:
                begin = strings + at
                names.add(data[begin : data.index(b"\0", begin)].decode())
    return names
