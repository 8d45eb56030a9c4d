"""Memory that only mirrors a file."""

import ctypes
import mmap
import sys

import torch
from torch import Tensor, nn

# The three highest bits of an entry of /proc/self/pagemap: present, swapped, of a file.
_NOWHERE, _OF_FILE = 0, 0b101
_DONTNEED = 4  # MADV_DONTNEED of Linux


def release_pages(tensor: Tensor) -> None:
    """Have the system take back the pages of a memory-mapped tensor, as it does when it needs some.

    Nothing is lost: the next reader of the tensor gets them of the file again. A tensor that is not
    mapped, or was written to since, stays as it is, and so does every one where there is no Linux.
    No other thread may write to the tensor meanwhile.
    """
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.is_contiguous()
    if sys.platform != "linux" or not plain or tensor.device.type != "cpu":
        return
    size = mmap.PAGESIZE  # pages that are the tensor's alone
    first, last = -(-tensor.data_ptr() // size), (tensor.data_ptr() + tensor.nbytes) // size
    if first < last and _unchanged(first, last):
        address, count = ctypes.c_void_p(first * size), ctypes.c_size_t((last - first) * size)
        ctypes.CDLL(None).madvise(address, count, _DONTNEED)


def _unchanged(first: int, last: int) -> bool:
    """Whether each of some pages is as its file has it, or not in memory at all."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(8 * first)
            entries = bytearray(pagemap.read(8 * (last - first)))
    except OSError:  # not for every process, nor in every sandbox
        return False
    if len(entries) != 8 * (last - first):
        return False
    flags = torch.frombuffer(entries, dtype=torch.uint8)[7::8] >> 5
    return bool(((flags == _NOWHERE) | (flags == _OF_FILE)).all())
