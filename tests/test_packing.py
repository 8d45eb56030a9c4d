"""pack_bits and unpack_bits: the word order of the format."""

import pytest
import reference
import torch
from helpers import to_numpy

from torch_onebit.packing import pack_bits, unpack_bits


@pytest.mark.parametrize("shape", [(32,), (3, 96), (2, 0, 64), (0, 32), (4, 0)])
def test_bits_and_words_convert_both_ways(shape):
    bits = torch.rand(shape) > 0.5
    packed = pack_bits(bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (*shape[:-1], shape[-1] // 32)
    assert torch.equal(torch.from_numpy(reference.unpack(to_numpy(packed))), bits)
    assert torch.equal(unpack_bits(packed), bits)


def test_first_value_is_the_lowest_bit():
    bits = torch.zeros(64, dtype=torch.bool)
    bits[1], bits[63] = True, True
    assert pack_bits(bits).tolist() == [2, -(2**31)]


@pytest.mark.parametrize("shape", [(3, 1), (0, 2)])
def test_words_of_any_stride(shape):
    packed = torch.randint(-(2**31), 2**31, (shape[0], 2 * shape[1])).to(torch.int32)[:, ::2]
    assert torch.equal(unpack_bits(packed), unpack_bits(packed.clone()))


ERRORS = [
    (lambda: pack_bits(torch.zeros(32)), "bits must be bool, got torch.float32"),
    (lambda: pack_bits(torch.zeros(33, dtype=torch.bool)), "bits must have a last dimension"),
    (lambda: unpack_bits(torch.zeros(2, dtype=torch.int64)), "packed must be int32 or uint32"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=[row[1] for row in ERRORS])
def test_illegal_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
