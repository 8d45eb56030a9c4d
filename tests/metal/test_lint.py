"""Shaders that Apple's compiler would refuse are refused here; ours are not."""

import emulator
import lint
import pytest
import toolchain

SHADERS = sorted(toolchain.SHADERS.glob("*.metal"))


@pytest.mark.parametrize("shader", SHADERS, ids=lambda path: path.stem)
def test_our_shaders_are_clean(shader):
    assert lint.lint(shader, [toolchain.SHADERS]) == []


HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
ARGUMENTS = "const device float* x [[buffer(0)]], device float* y [[buffer(1)]]"
INDEX = "uint i [[thread_position_in_grid]]"


def kernel(body, arguments=f"{ARGUMENTS}, {INDEX}", before="", head="[[kernel]] void k"):
    return f"{HEAD}{before}\n{head}({arguments}) {{ {body} }}\n"


UNROLL = '_Pragma("clang loop unroll(full)")'


def tensor_operation():
    """A product of x with itself, and a loop over the elements of its sums."""
    return (
        "using T = tensor<device float, dextents<int, 2>, tensor_inline>;"
        "T a((device float*)x, dextents<int, 2>(32, 64), array<int, 2>({1, 32}));"
        "constexpr auto shape = mpp::tensor_ops::matmul2d_descriptor(32, 64, 32, false, true);"
        "mpp::tensor_ops::matmul2d<shape, execution_simdgroups<4>> product;"
        "auto sum = product.get_destination_cooperative_tensor<T, T, float>();"
        "product.run(a, a, sum);"
        f"{UNROLL} for (ushort j = 0; j < sum.get_capacity(); j++) y[i] = sum[j];"
    )


def sums(extent):
    """A loop over words that multiplies into matrices of this extent."""
    return (
        f"simdgroup_float8x8 sum{extent}; for (uint j = 0; j < i; j++) {{ simdgroup_float8x8 a; "
        "simdgroup_multiply_accumulate(sum[0][0], a, a, sum[0][0]); } y[i] = 0;"
    )


BAD = {
    # address spaces
    "threadgroup pointer as device": (
        kernel("threadgroup float t[4]; device float* p = t; y[i] = p[0];"),
        "cannot initialize a variable of type '__global",
    ),
    "cast that drops constant": (
        kernel(
            "y[i] = *(device float*)p;", f"{ARGUMENTS}, constant float* p [[buffer(2)]], {INDEX}"
        ),
        "address space|invalid cast|converts between mismatching",
    ),
    "argument of another address space": (
        kernel("y[i] = f(y);", before="float f(threadgroup float* p) { return p[0]; }"),
        "no matching function",
    ),
    "parameter without address space": (
        kernel("y[i] = f(x);", before="float f(const float* p) { return p[0]; }"),
        "must name an address space",
    ),
    "local pointer without address space": (
        kernel("float* p = y; y[i] = p[0];"),
        "must name an address space",
    ),
    "reference without address space": (
        kernel("float a = x[i]; f(a); y[i] = a;", before="void f(float& a) { a = 1; }"),
        "must name an address space",
    ),
    "write through const": (kernel("x[i] = 0.0f; y[i] = 0.0f;"), "read-only|const"),
    "program variable outside constant": (
        kernel("y[i] = kA;", before="constexpr int kA = 1;"),
        "needs `constant`",
    ),
    "threadgroup variable in a helper": (
        kernel("y[i] = f();", before="float f() { threadgroup float t[4]; return t[0]; }"),
        "kernel's own scope",
    ),
    "initialised threadgroup variable": (
        kernel("threadgroup float t[4] = {0}; y[i] = t[0];"),
        "cannot have an initializer",
    ),
    # bindings
    "argument without attribute": (kernel("y[0] = x[0];", f"{ARGUMENTS}, uint i"), "no binding"),
    "buffer index twice": (
        kernel(
            "y[0] = x[0];", "const device float* x [[buffer(0)]], device float* y [[buffer(0)]]"
        ),
        "used twice",
    ),
    "buffer index 31": (
        kernel("y[0] = 0;", "device float* y [[buffer(31)]]"),
        "end at 30",
    ),
    "buffer by value": (
        kernel("y[0] = n;", "device float* y [[buffer(0)]], constant uint n [[buffer(1)]]"),
        "is not a pointer",
    ),
    "buffer without address space": (
        kernel("y[0] = 0;", "float* y [[buffer(0)]]"),
        "needs an address space",
    ),
    "built-in of the wrong type": (
        kernel(
            "y[0] = lane;", "device float* y [[buffer(0)]], int lane [[thread_index_in_simdgroup]]"
        ),
        "cannot be",
    ),
    "vector for a scalar built-in": (
        kernel("y[0] = 0;", "device float* y [[buffer(0)]], uint2 l [[thread_index_in_simdgroup]]"),
        "cannot be",
    ),
    "kernel that returns": (kernel("return 1;", head="[[kernel]] int k"), "must return void"),
    "host_name twice": (
        kernel("y[i] = x[i];", head='[[host_name("a")]] [[kernel]] void k')
        + '[[host_name("a")]] [[kernel]] void l(device float* y [[buffer(0)]]) { y[0] = 0; }',
        "is used at",
    ),
    "instance without host_name": (
        kernel("y[i] = T(x[i]);", head="template <typename T> [[kernel]] void k")
        + "template [[kernel]] decltype(k<float>) k<float>;",
        "needs a host_name",
    ),
    # language
    "double": (kernel("double a = 1; y[i] = a;"), "`double`"),
    "long long": (kernel("long long a = 1; y[i] = a;"), "`long long`"),
    "virtual": (kernel("y[i] = 0;", before="struct S { virtual float f(); };"), "`virtual`"),
    "new": (kernel("y[i] = *(new float);"), "`new`"),
    "exceptions": (kernel("try { y[i] = 0; } catch (...) {}"), "`try`"),
    "standard library": (kernel("y[i] = std::max(x[i], 0.0f);"), "`std`"),
    "recursion": (
        kernel("y[i] = f(3);", before="int f(int n) { return n ? f(n - 1) : 0; }"),
        "`f` is recursive",
    ),
    "mutual recursion": (
        kernel(
            "y[i] = f(3);",
            before="int g(int n);\nint f(int n) { return g(n); }\nint g(int n) { return f(n); }",
        ),
        "is recursive",
    ),
    "function pointer": (
        kernel("float (*p)(float) = f; y[i] = p(1);", before="float f(float a) { return a; }"),
        "function pointer|pointers to functions",
    ),
    # library
    "min of two types": (kernel("y[i] = min(i, 3);"), "ambiguous"),
    "function that does not exist": (kernel("y[i] = simd_total(x[i]);"), "undeclared|use of"),
    "simd_sum of bfloat": (kernel("y[i] = simd_sum(bfloat(x[i]));"), "deleted|void"),
    "simd_shuffle of 64 bits": (kernel("y[i] = simd_shuffle(ulong(i), 1);"), "deleted|void"),
    "as_type of another size": (kernel("y[i] = as_type<half>(x[i]);"), "sizes differ"),
    "matrix of another type": (
        kernel("simdgroup_float8x8 m; threadgroup half t[64]; simdgroup_load(m, t, 8); y[i] = 0;"),
        "no matching function",
    ),
    "wrong number of arguments": (kernel("y[i] = fma(x[i], 1.0f);"), "no matching function"),
    "missing return": (
        kernel("y[i] = f(1);", before="float f(int n) { if (n) return 1; }"),
        "return",
    ),
    "uninitialised variable": (kernel("float a; y[i] = a;"), "uninitialized"),
    # tensor operations
    "a const operand": (
        kernel(tensor_operation().replace("device float, d", "const device float, d")),
        "tensor_type",
    ),
    "half sums of float operands": (
        kernel(tensor_operation().replace("T, float>", "T, half>")),
        "no operation for these types",
    ),
    "a step of k of 16": (
        kernel(tensor_operation().replace("64, 32,", "64, 16,")),
        "extents of the operation",
    ),
    "a tile of 24 rows": (
        kernel(tensor_operation().replace("(32, 64,", "(24, 64,")),
        "extents of the operation",
    ),
    "threadgroup memory as a tensor of device memory": (
        kernel(
            "threadgroup float t[99];" + tensor_operation().replace("a((device float*)x", "a(t")
        ),
        "no matching constructor",
    ),
    "operands of other types than the sums were made for": (
        kernel(
            "T b = a; half c; " + tensor_operation().replace("run(a, a, sum)", "run(a, c, sum)")
        ),
        "no matching|unknown type|undeclared",
    ),
    "elements in a loop": (
        kernel(tensor_operation().replace(UNROLL, "")),
        "the loop indexes `sum`: unroll it",
    ),
    # registers
    "an array in a loop": (
        kernel("float a[4]; for (uint j = 0; j < 4; j++) a[j] = x[j]; y[i] = a[1];"),
        "the loop indexes `a`: unroll it",
    ),
    "a vector in a loop": (
        kernel("float4 a = 0; for (uint j = 0; j < 4; j++) { a[j] = x[j]; } y[i] = a[1];"),
        "the loop indexes `a`: unroll it",
    ),
    "an array of a struct in a loop": (
        kernel(
            "S s; for (uint j = 0; j < 4; j++) s.a[j] = x[j]; y[i] = s.a[1];",
            before="struct S { float a[4]; };",
        ),
        "the loop indexes `a`: unroll it",
    ),
    "an array in the outer loop": (
        kernel(
            f"float a[8]; for (uint j = 0; j < 8; j += 4) {{ {UNROLL}"
            "for (uint l = 0; l < 4; l++) { a[j + l] = x[l]; } } y[i] = a[1];"
        ),
        "the loop indexes `a`: unroll it",
    ),
    "an index made of the variable": (
        kernel(
            "float a[4]; for (uint j = 0; j < 4; j++) { const uint at = 3 - j; a[at] = x[j]; }"
            "y[i] = a[1];"
        ),
        "the loop indexes `a`: unroll it",
    ),
    "matrices in a loop": (
        kernel(
            "simdgroup_float8x8 a[2]; for (uint j = 0; j < 2; j++) simdgroup_load(a[j], x, 8);"
            "y[i] = 0;"
        ),
        "the loop indexes `a`: unroll it",
    ),
    "a loop over words unrolled": (
        kernel(f"float a = 0; {UNROLL} for (uint j = i; j < i + 9; j += 32) a += x[j]; y[i] = a;"),
        "its length is not constant",
    ),
    "16 matrices of sums": (kernel(sums("[4][4]")), "16 matrices of float sums, at most 8"),
    "totals beside 8 of them": (kernel(sums("[2][4], total[2]")), "10 matrices of float sums"),
    "totals in a statement of their own": (
        kernel(f"simdgroup_matrix<float, 8, 8> total[4]; {sums('[2][4]')}"),
        "12 matrices of float sums",
    ),
}


@pytest.mark.parametrize("defect", BAD)
def test_a_bad_shader_is_rejected_for_its_defect(defect, tmp_path):
    source, reason = BAD[defect]
    path = tmp_path / "bad.metal"
    path.write_text(source)
    errors = "\n".join(lint.lint(path))
    assert errors
    assert any(word in errors for word in reason.split("|")), errors


def test_the_frame_of_the_bad_shaders_is_clean(tmp_path):
    path = tmp_path / "good.metal"
    loops = (
        f"float a[4]; {UNROLL} for (uint j = 0; j < 4; j++) a[j] = x[j];"
        "for (uint j = 0; j < i; j++) y[i] = x[j] + a[1];"
    )
    path.write_text(kernel(loops + sums("[2][4]") + f"{{ {tensor_operation()} }}"))
    assert lint.lint(path) == []


def test_bfloat_takes_no_float_silently(tmp_path):
    # clang converts to __bf16, Apple's compiler does not: the emulator's type refuses it.
    path = tmp_path / "bfloat.metal"
    path.write_text(kernel("bfloat a = x[i]; y[i] = float(a);"))
    with pytest.raises(toolchain.CompileError, match=r"bfloat|SmallFloat"):
        emulator.build([path])


# Read and compiled at the first use of a kernel: bytes at most, of all the text it needs.
MOST_BYTES = 25_500


def test_every_shader_is_embedded_as_an_ascii_text_of_its_own():
    import embed

    sources = embed.shader_sources(toolchain.SHADERS)
    assert set(sources) == {shader.stem for shader in SHADERS}
    for text in sources.values():
        assert text.isascii() and len(text) <= MOST_BYTES
        assert '#include "' not in text
        assert text.count("struct QmmParams") == 1
