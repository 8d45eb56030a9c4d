"""No kernel reads the weights more often than its tiles force it to."""

import pytest
import traffic
from host_build import M1, M5

# m, n, k, group size, transpose, why
SHAPES = [
    (1, 64, 2560, 128, True, "decoding; k is no multiple of 2048"),
    (1, 64, 1024, 32, True, "smallest groups"),
    (2, 64, 1024, 128, True, "two rows"),
    (5, 64, 1024, 64, True, "five rows in an instance for six"),
    (8, 64, 1024, 128, True, "eight rows"),
    (30, 64, 256, 64, True, "a tile of 32 rows"),
    (40, 64, 1024, 128, True, "a tile of 64 rows"),
    (70, 64, 256, 128, True, "two of them"),
    (40, 64, 256, 32, True, "smallest groups in tiles"),
    (1, 1024, 96, 128, False, "backward of one row"),
    (1, 1024, 96, 32, False, "backward, smallest groups"),
    (40, 256, 96, 128, False, "backward in tiles"),
    (40, 256, 96, 32, False, "backward in tiles, smallest groups"),
]


@pytest.mark.parametrize("m, n, k, group_size, transpose, why", SHAPES)
def test_weights_are_read_once_per_pass(m, n, k, group_size, transpose, why):
    t = traffic.measure(m, n, k, group_size=group_size, transpose=transpose)
    assert t.ratio("packed") == traffic.passes(m, transpose)
    assert t.ratio("scales") <= 1.1 * traffic.passes(m, transpose)
    assert t.ratio("biases") <= 1.1 * traffic.passes(m, transpose)


# m, GPU, how often a line of packed words, of 32 steps, may leave the L1
LINES = [
    (32, M1, 8, "every fourth step"),
    (64, M1, 8, "64 lines of x are all that the L1 holds"),
    (64, M5, 16, "two threads hold a row, so every second step"),
]


@pytest.mark.parametrize("m, gpu, misses, why", LINES)
def test_tiles_do_not_fetch_a_line_for_every_word(m, gpu, misses, why, monkeypatch):
    monkeypatch.setenv("ONEBIT_FAKE_GPU", gpu)
    t = traffic.measure(m, 64, 1024)
    assert t.missed["packed"] <= misses * t.minimum["packed"]


def test_qmv_shares_x_among_the_rows_of_a_simdgroup():
    t = traffic.measure(1, 64, 2560)
    assert t.read["x"] <= t.naive_x / 8
