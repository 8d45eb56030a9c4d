"""The emulator computes what MSL means, and reports what a kernel must not do."""

from pathlib import Path

import emulator
import numpy as np
import pytest

HERE = Path(__file__).parent

BROKEN = {
    "missing_barrier": r"data race|uninitialised threadgroup tile",
    "missing_barrier_before_reuse": r"data race: (write|read) of threadgroup tile",
    "barrier_of_other_memory": r"data race: read of threadgroup tile",
    "simdgroup_barrier_between_simdgroups": r"data race: (write|read) of threadgroup tile",
    "simd_sum_is_no_barrier": r"data race: read of threadgroup tile",
    "device_memory_without_barrier": r"data race: write of buffer\(1\)",
    "two_threads_write_one_value": r"data race: write of buffer\(1\)",
    "two_threadgroups_write_one_value": r"data race: write of buffer\(1\).*threadgroup [01]",
    "read_past_the_end": r"out-of-bounds 4-byte read: buffer\(0\) \(256 bytes\) at byte 256",
    "read_before_the_start": r"out-of-bounds 4-byte read: buffer\(0\) \(256 bytes\) at byte -4",
    "read_far_outside": r"out-of-bounds 4-byte read",
    "write_past_the_end": r"out-of-bounds 4-byte write: buffer\(1\)",
    "tail_without_bound": r"out-of-bounds 4-byte write: buffer\(1\)",
    "past_a_threadgroup_array": r"out-of-bounds 4-byte write: threadgroup tile",
    "write_to_read_only": r"write to read-only buffer\(0\)",
    "struct_longer_than_its_buffer": r"buffer\(2\) has 4 bytes, the struct needs 8",
    "buffer_not_bound": r"missing buffer binding at index 3",
    "unused_buffer_not_bound": r"missing buffer binding at index 3",
    "uninitialised_threadgroup_memory": r"uninitialised threadgroup tile .* at byte 20",
    "uninitialised_output": r"uninitialised buffer\(1\)",
    "output_not_written": r"16 bytes of buffer\(1\) never written",
    "barrier_in_a_branch": r"divergence: .*32 thread\(s\) returned",
    "return_before_a_barrier": r"divergence: 60 thread\(s\) at threadgroup_barrier .* 4 thread",
    "two_barriers_in_two_branches": r"divergence: 32 thread\(s\) .* 32 thread\(s\) at thr",
    "barriers_of_different_number": r"divergence: 32 thread\(s\) returned",
    "simd_sum_in_a_branch": r"divergence: .*simdgroup operation",
    "shuffle_after_return": r"divergence: .*simdgroup operation",
    "misaligned_vector_load": r"misaligned vector of 16 bytes: address is 4 past",
    "misaligned_vector_store": r"misaligned vector of 16 bytes: address is 8 past",
    "misaligned_word": r"misaligned 4-byte read of buffer\(0\)",
    "too_much_threadgroup_memory": r"threadgroup memory of 40000 bytes exceeds 32768",
    "division_by_zero": r"integer division by zero",
    "operation_of_too_few_threads": r"an operation of 32 threads in a threadgroup of 64",
    "operation_in_a_branch": r"divergence: 32 thread\(s\) (at|returned).* 32 thread",
    "no_barrier_before_an_operation": r"data race|uninitialised threadgroup tile",
    "no_barrier_after_an_operation": r"data race: (read|write) of threadgroup",
}


@pytest.fixture(scope="module")
def broken():
    return emulator.Library([HERE / "broken_kernels.metal"])


def run(library, kernel, **options):
    x, y = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    short = kernel == "struct_longer_than_its_buffer"
    params = np.array([64] if short else [64, 0], np.uint32)
    groups = 2 if kernel == "two_threadgroups_write_one_value" else 1
    library.run(kernel, {0: x, 2: params}, {1: y}, (groups,), (64,), **options)
    return x, y


SCHEDULES = (emulator.FORWARD, emulator.REVERSE, emulator.RANDOM)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_sound_kernel_is_not_reported(broken, schedule):
    x, y = run(broken, "sound", schedule=schedule)
    assert np.array_equal(y, x[::-1] + 32)


@pytest.mark.parametrize("kernel", BROKEN)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_broken_kernel_is_reported_for_its_defect(broken, kernel, schedule):
    with pytest.raises(emulator.EmulatorError, match=BROKEN[kernel]) as report:
        run(broken, kernel, schedule=schedule)
    assert kernel in str(report.value)


def test_every_broken_kernel_has_a_row(broken):
    assert set(broken.kernels()) == {*BROKEN, "sound"}
    assert len(BROKEN) >= 20


def test_a_report_names_file_and_line(broken):
    line = next(
        number
        for number, text in enumerate((HERE / "broken_kernels.metal").open(), 1)
        if "KERNEL(read_past_the_end)" in text
    )
    with pytest.raises(emulator.EmulatorError, match=rf"broken_kernels\.metal:{line}\b"):
        run(broken, "read_past_the_end")


FEATURES = """
#include <metal_stdlib>
using namespace metal;
constant uint kFactor [[function_constant(0)]];

template <typename T>
[[kernel]] void rounds(const device T* x [[buffer(0)]], device T* y [[buffer(1)]],
                       uint i [[thread_position_in_grid]]) {
  const T one = T(1.0);
  T sum = x[i] + one;  // rounded to T
  sum = sum * x[i];    // and again
  y[i] = T(float(sum) * kFactor);
}
template [[host_name("rounds_half")]] [[kernel]] decltype(rounds<half>) rounds<half>;
template [[host_name("rounds_bfloat")]] [[kernel]] decltype(rounds<bfloat>) rounds<bfloat>;

[[kernel]] void lanes(const device uint* x [[buffer(0)]], device uint* y [[buffer(1)]],
                      uint i [[thread_index_in_threadgroup]],
                      uint lane [[thread_index_in_simdgroup]]) {
  const uint votes = uint(ulong(simd_ballot((x[i] & 1u) != 0)));
  y[i] = simd_shuffle_xor(x[i], 3) + simd_max(x[i]) + simd_shuffle_down(x[i], 0) + votes;
}

[[kernel]] void product(const device float* a [[buffer(0)]], device float* c [[buffer(1)]],
                        const device float* b [[buffer(2)]]) {
  simdgroup_float8x8 ma, mb, mc = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);
  simdgroup_load(ma, a, 8);
  simdgroup_load(mb, b, 8, ulong2(0), true);
  simdgroup_multiply_accumulate(mc, ma, mb, mc);
  simdgroup_store(mc, c, 8);
}
"""


FUSES = """
#include <metal_stdlib>
PRAGMA
[[kernel]] void k(const device float* x [[buffer(0)]], device float* y [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {
  y[i] = x[0] * x[1] + x[2];
}
"""


@pytest.mark.parametrize("pragma, fused", [("", True), ("#pragma METAL fp contract(off)", False)])
def test_products_are_fused_unless_the_source_forbids_it(pragma, fused, tmp_path):
    source = tmp_path / "fuses.metal"
    source.write_text(FUSES.replace("PRAGMA", pragma))
    x, y = np.array([3, 1 + 2.0**-23, -3 - 2.0**-21], np.float32), np.zeros(1, np.float32)
    emulator.Library([source]).run("k", {0: x}, {1: y}, (1,), (1,))
    assert (y[0] != 0) == fused


def test_a_pragma_after_a_function_is_refused(tmp_path):
    source = tmp_path / "late.metal"
    source.write_text(FUSES.replace("PRAGMA", "") + "#pragma METAL fp contract(off)\n")
    with pytest.raises(emulator.MslError, match="must precede every function"):
        emulator.Library([source])


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    source = tmp_path_factory.mktemp("msl") / "features.metal"
    source.write_text(FEATURES)
    library = emulator.Library([source])
    library.set_constant(0, np.uint32(3))
    return library


def test_half_rounds_after_every_operation(features):
    x = np.random.default_rng(0).standard_normal(64).astype(np.float16)
    y = np.zeros_like(x)
    features.run("rounds_half", {0: x}, {1: y}, (2,), (32,))
    expected = (((x + np.float16(1)) * x).astype(np.float32) * 3).astype(np.float16)
    assert np.array_equal(y, expected)


def test_every_half_converts_to_float_and_back(features):
    features.set_constant(0, np.uint32(1))
    x = np.arange(65536, dtype=np.uint16).view(np.float16)
    y = np.zeros_like(x)
    with np.errstate(all="ignore"):
        features.run("rounds_half", {0: x}, {1: y}, (2048,), (32,))
        expected = (x + np.float16(1)) * x
    assert np.array_equal(y, expected, equal_nan=True)
    features.set_constant(0, np.uint32(3))


def test_bfloat_rounds_to_nearest_even(features):
    values = np.array([1.0, 1.0078125, -2.5, 3e38, 1e-40], np.float32)
    x = (values.view(np.uint32) >> 16).astype(np.uint16).repeat(7)[:32].copy()
    y = np.zeros_like(x)
    features.run("rounds_bfloat", {0: x}, {1: y}, (1,), (32,))

    def rounded(f):
        u = f.astype(np.float32).view(np.uint32).astype(np.uint64)
        return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint32).__lshift__(16).view("f4")

    wide = (x.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        expected = rounded(rounded(rounded(wide + np.float32(1)) * wide) * np.float32(3))
    assert np.array_equal((y.astype(np.uint32) << 16).view(np.float32), expected)


def test_lanes_exchange_values(features):
    x = np.random.default_rng(1).integers(0, 1000, 64).astype(np.uint32)
    y = np.zeros_like(x)
    features.run("lanes", {0: x}, {1: y}, (1,), (64,))
    groups = x.reshape(2, 32)
    votes = ((groups & 1) << np.arange(32, dtype=np.uint32)).sum(1, dtype=np.uint32)
    shuffled = groups[:, np.arange(32) ^ 3]
    expected = shuffled + groups.max(1, keepdims=True) + groups + votes[:, None]
    assert np.array_equal(y, expected.ravel())


def test_simdgroup_matrices_multiply(features):
    a, b = np.random.default_rng(2).standard_normal((2, 8, 8)).astype(np.float32)
    c = np.zeros_like(a)
    features.run("product", {0: a, 2: b}, {1: c}, (1,), (32,))
    np.testing.assert_allclose(c, 1 + a @ b.T, rtol=1e-5)


ACCESSES = """
#include <metal_stdlib>
using namespace metal;
#define ARGUMENTS const device float* x [[buffer(0)]], device float* y [[buffer(1)]], \\
                  uint lane [[thread_index_in_simdgroup]]
#define BANKS(name, ...)                                 \\
  [[kernel]] void name(ARGUMENTS) {                      \\
    threadgroup float4 tile4[512];                       \\
    threadgroup float* tile = (threadgroup float*)tile4; \\
    __VA_ARGS__;                                         \\
    y[lane] = 0;                                         \\
  }
BANKS(rows, tile[lane] = x[lane])
BANKS(columns, tile[lane * 32] = x[lane])
BANKS(padded_columns, tile[lane * 33] = x[lane])
BANKS(two_banks, tile[lane * 16] = x[lane])
BANKS(vectors, tile4[lane] = *(const device float4*)(x + lane / 32))
BANKS(padded_vectors, tile4[lane * 9 % 512] = *(const device float4*)(x + lane / 32))
BANKS(halves, ((threadgroup half*)tile)[lane] = half(x[lane]))
#define TWICE(name, floats)                                       \\
  [[kernel]] void name(ARGUMENTS) {                               \\
    float sum = 0;                                                \\
    for (uint i = 0; i < 2 * floats; i += 32) sum += x[(i + lane) % floats]; \\
    y[lane] = sum;                                                \\
  }
TWICE(twice_8_KB, 2048)
TWICE(twice_16_KB, 4096)
"""


@pytest.fixture(scope="module")
def accesses(tmp_path_factory):
    source = tmp_path_factory.mktemp("msl") / "accesses.metal"
    source.write_text(ACCESSES)
    return emulator.Library([source])


@pytest.mark.parametrize(
    "kernel, cycles, why",
    [
        ("rows", 1, "a word in each bank"),
        ("columns", 32, "all in one bank"),
        ("padded_columns", 1, "each in the next bank"),
        ("two_banks", 16, "all in two banks"),
        ("vectors", 1, "128 words in 4 cycles, the least"),
        ("padded_vectors", 1, "36 words from one to the next"),
        ("halves", 1, "two lanes share a word"),
    ],
)
def test_banks_of_threadgroup_memory(accesses, kernel, cycles, why):
    x = np.zeros(64, np.float32)
    accesses.run(kernel, {0: x}, {1: np.zeros(32, np.float32)}, (1,), (32,), count_traffic=True)
    assert accesses.conflicts == cycles


@pytest.mark.parametrize(
    "kernel, floats, passes, why",
    [
        ("twice_8_KB", 2048, 1, "as much as the L1 holds"),
        ("twice_16_KB", 4096, 2, "gone when it is read again"),
    ],
)
def test_the_l1_has_8_kilobytes(accesses, kernel, floats, passes, why):
    x = np.zeros(floats, np.float32)
    accesses.run(kernel, {0: x}, {1: np.zeros(32, np.float32)}, (1,), (32,), count_traffic=True)
    assert accesses.traffic[0] == 2 * x.nbytes
    assert accesses.missed[0] == passes * x.nbytes


def test_traffic_counts_lanes_of_one_load_once(features):
    x = np.zeros(64, np.uint32)
    features.run("lanes", {0: x}, {1: np.zeros_like(x)}, (1,), (64,), count_traffic=True)
    assert features.traffic[0] % x.nbytes == 0
