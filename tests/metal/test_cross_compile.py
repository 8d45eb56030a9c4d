"""The extension builds for macOS arm64 against users' wheels, and a defect would show."""

import os
import re
import subprocess

import host_build
import mac_build
import mac_torch
import pytest
import toolchain

MPS = mac_build.MPS


def wheel(version):
    try:
        return mac_torch.fetch(version)
    except mac_torch.NotAvailable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"not proven here: {error}")


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0", ""], ids=["2.10.0", "2.13.0", "newest"])
def test_mps_links_against_the_mac_wheel(version, tmp_path):
    torch = wheel(version)
    objects = mac_build.objects_of(mac_build.MPS_SOURCES, torch)
    assert mac_build.unresolved(objects, torch) == []
    assert mac_build.link(objects, torch, tmp_path).stat().st_size > 0


def test_the_whole_extension_links_against_the_mac_wheel(tmp_path):
    torch = wheel("2.13.0")
    objects = mac_build.objects_of(mac_build.SOURCES, torch)
    assert mac_build.unresolved(objects, torch) == []
    assert mac_build.link(objects, torch, tmp_path).stat().st_size > 0


def test_no_source_for_a_mac_reads_a_tensor_by_the_templated_accessor():
    """Its symbol differs between the clang that torch 2.10 was built with and those since 18."""
    sources = [*mac_build.SOURCES, *mac_build.CSRC.rglob("*.h")]
    found = [p for p in sources if re.search(r"const_data_ptr<", p.read_text())]
    assert [str(p) for p in found if "cuda" not in p.parts] == []


MUTANTS = {
    "wrong selector": (
        "[encoder memoryBarrierWithScope:MTLBarrierScopeBuffers];\n        (*ready)",
        "[encoder memoryBarrierWithSize:MTLBarrierScopeBuffers];\n        (*ready)",
        "memoryBarrierWithSize:",
    ),
    "missing bridge": (
        "(__bridge const void*)device",
        "(const void*)device",
        "requires a bridged cast|no matching member function for call to 'try_emplace'",
    ),
    "missing availability guard": (
        "if (@available(macOS 15.0, *)) {",
        "if (true) {",
        "only available on macOS 15.0",
    ),
    "moved namespace": (
        "at::mps::MPSDevice::getInstance()",
        "at::native::mps::MPSDevice::getInstance()",
        "no member named|undeclared identifier|use of undeclared",
    ),
    "wrong return type": (
        "id<MTLLibrary> library =\n      [device newLibraryWithSource:",
        "id<MTLBuffer> library =\n      [device newLibraryWithSource:",
        "cannot initialize|incompatible",
    ),
}


def compile_mutant(text, folder, torch, *, arc=True, output=("-fsyntax-only",)):
    source = folder / "encoder.mm"
    source.write_text(text)
    command = [c for c in mac_build.compiler(torch) if arc or c != "-fobjc-arc"]
    target = folder / "encoder.o"
    command += [*host_build.include_of(source), *output, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done, target


@pytest.fixture(scope="module")
def mutant(tmp_path_factory):
    """An encoder with all defects, and what the compiler says of it: 7 seconds for each else."""
    text = (MPS / "encoder.mm").read_text()
    for before, after, _ in MUTANTS.values():
        assert before in text
        text = text.replace(before, after)
    done, _ = compile_mutant(text, tmp_path_factory.mktemp("mutant"), wheel("2.13.0"))
    assert done.returncode != 0
    return text, done.stderr


@pytest.mark.parametrize("defect", MUTANTS)
def test_a_defect_in_the_encoder_does_not_compile(defect, mutant):
    _, after, reason = MUTANTS[defect]
    text, stderr = mutant
    first = text[: text.index(after)].count("\n") + 1
    errors = re.findall(r"encoder\.mm:(\d+):\d+: error: (.*)", stderr)
    there = [words for line, words in errors if first <= int(line) <= first + 5]
    assert any(re.search(reason, words) for words in there), stderr


GUARD = "if (@available(macOS 26.2, *)) return family >= kFirstTensorFamily;\n  return false;"
# what guards Metal 4's operations, the versions of macOS that the compiled encoder asks for
GUARDS = {
    "as it is": (GUARD, [(15, 0), (26, 2)]),
    "no guard": ("return family >= kFirstTensorFamily;", [(15, 0)]),
    "an older system": (GUARD.replace("26.2", "26.0"), [(15, 0), (26, 0)]),
}


@pytest.mark.parametrize("guard", GUARDS)
def test_tensor_operations_wait_for_a_system_that_has_them(guard, tmp_path):
    """No compiler would mind: what is young has no name in older SDKs, and is a number here."""
    text = (MPS / "encoder.mm").read_text()
    assert text.count(GUARD) == 1
    replacement, versions = GUARDS[guard]
    output = ("-S", "-emit-llvm")
    done, target = compile_mutant(
        text.replace(GUARD, replacement), tmp_path, wheel("2.13.0"), output=output
    )
    assert done.returncode == 0, done.stderr
    asked = r"@__isPlatformVersionAtLeast\(i32 1, i32 (\d+), i32 (\d+), i32 0\)"
    found = {(int(a), int(b)) for a, b in re.findall(asked, target.read_text())}
    assert sorted(found) == versions


def test_the_encoder_asks_for_arc(tmp_path):
    original = (MPS / "encoder.mm").read_text()
    done, _ = compile_mutant(original, tmp_path, wheel("2.13.0"), arc=False)
    assert done.returncode != 0
    assert "compile with -fobjc-arc" in done.stderr


def test_a_symbol_the_wheel_does_not_export_is_found(tmp_path):
    torch = wheel("2.13.0")
    text = (MPS / "encoder.mm").read_text()
    text = text.replace(
        "namespace onebit::mps {\nnamespace {",
        "namespace at::mps { void removed(); }\nnamespace onebit::mps {\nnamespace {",
    ).replace("Gpu current_gpu() {", "Gpu current_gpu() {\n  at::mps::removed();")
    done, target = compile_mutant(text, tmp_path, torch, output=("-c",))
    assert done.returncode == 0, done.stderr
    objects = [
        o for o in mac_build.objects_of(mac_build.MPS_SOURCES, torch) if "encoder" not in o.name
    ]
    assert mac_build.unresolved([target, *objects], torch) == ["__ZN2at3mps7removedEv"]
    with pytest.raises(toolchain.CompileError, match="undefined symbol"):
        mac_build.link([target, *objects], torch, tmp_path)
