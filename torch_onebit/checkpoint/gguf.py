"""The GGUF container: metadata and tensors of one file, memory-mapped, and its writer.

Every length, count and offset is compared with what the file still has before it is followed, so
time and memory are bounded by the size of the file, and by the limits below.
"""

import math
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from torch_onebit.checkpoint.files import check_regular, replaced_file
from torch_onebit.checkpoint.source import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_STRINGS = 1 << 23  # tokens and merges of the largest vocabularies are some 600,000
MAX_ENTRIES = 1 << 16
MAX_TENSORS = 1 << 20
MAX_DIMENSIONS = 4

# name, weights of a block, bytes of a block
F32, F16, Q8_0, BF16, Q1_0 = 0, 1, 8, 30, 41
BLOCKS = {F32: (1, 4), F16: (1, 2), Q8_0: (32, 34), BF16: (1, 2), Q1_0: (128, 18)}
TYPE_NAMES = {
    **dict(enumerate("F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1".split())),
    **dict(enumerate("Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S".split(), 10)),
    **dict(enumerate("IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16".split(), 20)),
    **dict(enumerate("TQ1_0 TQ2_0".split(), 34)),
    **dict(enumerate("MXFP4 NVFP4 Q1_0 Q2_0".split(), 39)),
}
TERNARY = ("TQ1_0", "TQ2_0", "Q2_0")

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


def type_name(number: int) -> str:
    return TYPE_NAMES.get(number, f"number {number}, which is unknown")


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies; ``shape`` in torch's order, ``size`` None for types not known."""

    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int
    size: int | None

    def __str__(self) -> str:
        return f"{self.name} ({type_name(self.kind)})"


class GGUFFile:
    """An open file.

    Raises:
        CheckpointError: not such a file, damaged, or of big-endian order.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_regular(self.path)
        with self.path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise CheckpointError(f"{path} must be a GGUF file, got another kind")
            # Copied when written to: levels that train never reach the file.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        read = _Reader(self._map, self.path)
        version = read.scalar("I")
        if version not in VERSIONS:
            raise read.error(f"version must be one of {VERSIONS}, little-endian, got {version}")
        tensors, entries = read.scalar("Q"), read.scalar("Q")
        if tensors > MAX_TENSORS or entries > MAX_ENTRIES:
            raise read.error(f"got {tensors} tensors and {entries} entries, more than can be meant")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = read.string()
            if key in self.metadata:
                raise read.error(f"{key!r} must be there once")
            self.metadata[key] = read.value(read.scalar("I"))
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment not in [2**n for n in range(17)]:
            raise read.error(f"general.alignment must be a power of 2 to 65536, got {alignment!r}")
        listed = [read.tensor() for _ in range(tensors)]
        start = read.at + -read.at % alignment
        self.tensors = {t.name: _placed(t, start, alignment, read) for t in listed}
        if len(self.tensors) != len(listed):
            raise read.error("names of tensors must differ")
        _check_overlap(self.tensors.values(), read)

    def bytes_of(self, tensor: GGUFTensor) -> Tensor:
        """The bytes of a tensor, ``[size]`` uint8: a view of the file."""
        if not tensor.size:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(
            self._map, dtype=torch.uint8, count=tensor.size, offset=tensor.offset
        )

    def release(self, tensor: GGUFTensor) -> None:
        """Have the system take back the memory of a tensor that was copied, and not written to."""
        size = mmap.PAGESIZE
        first, last = -(-tensor.offset // size), (tensor.offset + (tensor.size or 0)) // size
        if first < last and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first * size, (last - first) * size)


class _Reader:
    """A place in a file, which moves on and never past the end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path = data, path
        self._size = len(data)
        self._strings = 0
        self.at = len(MAGIC)

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {message}")

    @property
    def size(self) -> int:
        return self._size

    def take(self, count: int) -> int:
        """Move on by so many bytes; returns where they begin."""
        if count > self._size - self.at:
            raise self.error(f"must have {count} bytes at {self.at}, got {self._size - self.at}")
        self.at += count
        return self.at - count

    def scalar(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self._data, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        self._strings += 1
        if self._strings > MAX_STRINGS:
            raise self.error(f"must have at most {MAX_STRINGS} strings, got more")
        size = self.scalar("Q")
        start = self.take(size)
        try:
            return self._data[start : start + size].decode()
        except UnicodeDecodeError as error:
            raise self.error(f"strings must be UTF-8, got {error.reason} at {start}") from error

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.error(f"values must be of a type from 0 to 12, got {kind}")
        item, count = self.scalar("I"), self.scalar("Q")
        if item == _STRING:
            if count * 8 > self._size - self.at:
                raise self.error(f"must have room for {count} strings, got {self._size - self.at}")
            return [self.string() for _ in range(count)]
        if item not in _SCALARS:
            raise self.error(f"arrays must hold scalars or strings, got type {item}")
        dtype = np.dtype("<" + _SCALARS[item])
        start = self.take(count * dtype.itemsize)
        return np.frombuffer(self._data, dtype, count, start)

    def tensor(self) -> GGUFTensor:
        """One entry of the list of tensors; offset still counts from where the data begin."""
        name = self.string()
        count = self.scalar("I")
        if count > MAX_DIMENSIONS:
            raise self.error(f"{name} must have at most {MAX_DIMENSIONS} dimensions, got {count}")
        shape = tuple(self.scalar("Q") for _ in range(count))[::-1]
        kind = self.scalar("I")
        return GGUFTensor(name, kind, shape, self.scalar("Q"), _size(name, kind, shape, self))


def _size(name: str, kind: int, shape: tuple[int, ...], read: _Reader) -> int | None:
    if kind not in BLOCKS:
        return None
    weights, size = BLOCKS[kind]
    if weights > 1 and (not shape or shape[-1] % weights):
        raise read.error(
            f"{name} must have rows of whole blocks of {weights}, got shape {list(shape)}"
        )
    return math.prod(shape) // weights * size


def _placed(t: GGUFTensor, start: int, alignment: int, read: _Reader) -> GGUFTensor:
    end = start + t.offset + (t.size or 0)
    if t.offset % alignment or (end > read.size and (t.size or t.size is None)):
        raise read.error(
            f"{t.name} must lie in the file, at a multiple of {alignment}, "
            f"got bytes {start + t.offset} to {end} of {read.size}"
        )
    return GGUFTensor(t.name, t.kind, t.shape, start + t.offset, t.size)


def _check_overlap(tensors: Iterable[GGUFTensor], read: _Reader) -> None:
    last: GGUFTensor | None = None
    for t in sorted((t for t in tensors if t.size), key=lambda t: t.offset):
        if last is not None and t.offset < last.offset + (last.size or 0):
            raise read.error(f"{last.name} and {t.name} must not overlap")
        last = t


def write_gguf(
    path: str | Path,
    metadata: dict[str, Any],
    tensors: Iterable[tuple[GGUFTensor, Any]],
) -> None:
    """Write a file in the place of the one at path, at once.

    Args:
        path: the file.
        metadata: by key: bool, int (as uint32), float (as float32), str, lists of str, and arrays
            of NumPy.
        tensors: where each lies is computed here; its bytes come from a call ``() -> Tensor`` of
            uint8, one after the other.
    """
    listed = list(tensors)
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(listed), len(metadata)))
    for key, value in metadata.items():
        header += _string(key) + _value(key, value)
    offset = 0
    for t, _ in listed:
        dims = t.shape[::-1]
        header += _string(t.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        header += struct.pack("<IQ", t.kind, offset)
        offset += (t.size or 0) + -(t.size or 0) % ALIGNMENT
    with replaced_file(Path(path)) as draft, draft.open("wb") as file:
        _write_padded(file, header)
        for t, make in listed:
            data = make().numpy()
            if data.nbytes != t.size:
                raise CheckpointError(f"{t.name} must have {t.size} bytes, got {data.nbytes}")
            _write_padded(file, data.data)


def _write_padded(file: BinaryIO, data: Any) -> None:
    file.write(data)
    file.write(bytes(-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, np.ndarray):
        kinds = {code: kind for kind, code in _SCALARS.items()}
        head = struct.pack("<IIQ", _ARRAY, kinds[value.dtype.char], len(value))
        return head + value.tobytes()
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        head = struct.pack("<IIQ", _ARRAY, _STRING, len(value))
        return head + b"".join(map(_string, value))
    raise CheckpointError(f"{key} must be a bool, int, float, str or array, got {type(value)}")
