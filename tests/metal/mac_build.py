"""Cross-compiles the extension for macOS arm64, as setup.py builds it there, and links it.

python tests/metal/mac_build.py 2.10.0 2.13.0 newest    against these versions' wheels
"""

import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import host_build
import mac_torch
import macho
import toolchain
from mac_torch import MacTorch

CSRC = toolchain.ROOT / "csrc"
MPS = CSRC / "mps"
MPS_SOURCES = sorted([*MPS.glob("*.cpp"), *MPS.glob("*.mm")])
# All of them, as setup.py names them on a Mac.
SOURCES = [
    *MPS_SOURCES,
    *sorted(
        path
        for pattern in ("*.cpp", "ops/*/*.cpp", "cpu/**/*.cpp", "bench/*.cpp")
        for path in CSRC.glob(pattern)
    ),
]
# Symbols the frameworks export, of those that an Objective-C++ file can need.
FRAMEWORKS = {
    "Foundation": ["NSString", "NSError", "NSProcessInfo"],
    "Metal": ["MTLCompileOptions", "MTLFunctionConstantValues"],
}
OBJC_RUNTIME = re.compile(r"_objc_\w+|__objc_empty_(cache|vtable)")
# libc++ and libc++abi, which zig brings in its own inline namespace (__1), as Apple's.
CXX_RUNTIME = re.compile(
    r"__ZNK?St3__1|__ZNK?St|__ZT[ISVT]N?St|__ZTVN10__cxxabiv1|__ZT[IS]|__Zn[aw]|__Zd[al]"
    r"|___cxa_|___gxx_personality_v0|__Unwind_|___dso_handle|__ZSt"
)
COMPILER_RUNTIME = {"___isPlatformVersionAtLeast", "___isOSVersionAtLeast"}


def compiler(torch: MacTorch) -> list[str]:
    include, apple = torch.include, host_build.HEADERS / "apple"
    return [
        *(toolchain.zig(), "c++", "-target", "aarch64-macos.14.0", "-std=c++20", "-O0", "-fPIC"),
        "-fno-sanitize=all",  # which zig adds to what is not optimized
        *(
            "-fobjc-arc",
            "-Xclang",
            "-fopenmp",
            "-Wno-everything",
            "-Werror=unguarded-availability-new",
        ),
        *("-Werror=objc-method-access", "-Werror=incompatible-pointer-types"),
        *("-Werror=deprecated-declarations", "-Werror=return-type"),
        *("-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")),
        *("-isystem", str(apple)),
    ]


def object_of(source: Path, torch: MacTorch) -> Path:
    headers = host_build.inputs_of(source)
    if source.parent != MPS:
        headers = sorted({*headers, *CSRC.rglob("*.h")})
    command = [*compiler(torch), f"-DTORCH={torch.found}", f"-I{source.parent}"]
    command += host_build.include_of(source)
    return toolchain.object_file(source, command, headers)


def objects_of(sources: list[Path], torch: MacTorch) -> list[Path]:
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda source: object_of(source, torch), sources))


def unresolved(objects: list[Path], torch: MacTorch) -> list[str]:
    """Symbols that neither the objects, torch, nor the system would bring: dyld would refuse."""
    data = [o.read_bytes() for o in objects]
    needed = set().union(*(macho.undefined(d) for d in data))
    have = torch.exports | system_symbols() | COMPILER_RUNTIME
    have |= set().union(*(macho.defined(d) for d in data))
    for classes in FRAMEWORKS.values():
        have |= {f"_OBJC_CLASS_$_{name}" for name in classes}
    return sorted(
        s for s in needed - have if not OBJC_RUNTIME.fullmatch(s) and not CXX_RUNTIME.match(s)
    )


def system_symbols() -> set[str]:
    """libSystem's exports, from the list in the ziglang wheel."""
    text = (Path(toolchain.zig()).parent / "lib/libc/darwin/libSystem.tbd").read_text()
    names = re.findall(r"symbols:\s*\[(.*?)\]", text, re.DOTALL)
    return {n.strip().strip("'\"") for group in names for n in group.split(",")}


def stub(path: Path, install_name: str, symbols: list[str], classes: list[str] = ()) -> Path:
    """A text-based dynamic library for the linker."""
    quoted = ", ".join(f"'{s}'" for s in sorted(symbols))
    path.write_text(
        "--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\n"
        f"install-name: '{install_name}'\nexports:\n  - targets: [ arm64-macos ]\n"
        f"    symbols: [ {quoted} ]\n    objc-classes: [ {', '.join(classes)} ]\n...\n"
    )
    return path


def link(objects: list[Path], torch: MacTorch, folder: Path) -> Path:
    """Against stubs of what the libraries export: zig's own libc++ would take minutes to build."""
    needed = set().union(*(macho.undefined(o.read_bytes()) for o in objects))
    runtime = [s for s in needed if CXX_RUNTIME.match(s)]
    stubs = [
        stub(folder / "libtorch_cpu.tbd", "@rpath/libtorch_cpu.dylib", needed & torch.exports),
        stub(folder / "libc++.tbd", "/usr/lib/libc++.1.dylib", runtime),
        # zig knows libSystem by itself; the compiler's own runtime is a static library on a Mac.
        stub(folder / "libclang_rt.tbd", "/usr/lib/libclang_rt.dylib", sorted(COMPILER_RUNTIME)),
        stub(
            folder / "libobjc.tbd",
            "/usr/lib/libobjc.A.dylib",
            [s for s in needed if OBJC_RUNTIME.fullmatch(s)],
        ),
    ]
    for name, classes in FRAMEWORKS.items():
        path = f"/System/Library/Frameworks/{name}.framework/Versions/A/{name}"
        stubs.append(stub(folder / f"{name}.tbd", path, [], classes))
    library = folder / "_C.abi3.so"
    toolchain.run(
        [
            *(toolchain.zig(), "cc", "-target", "aarch64-macos.14.0", "-shared", "-nostdlib"),
            *("-o", str(library), *map(str, objects), *map(str, stubs)),
        ]
    )
    return library


def main(versions: list[str]) -> None:
    """The whole extension against each of these wheels; an error names what does not link."""
    for version in versions:
        start = time.perf_counter()
        torch = mac_torch.fetch("" if version == "newest" else version)
        objects = objects_of(SOURCES, torch)
        if missing := unresolved(objects, torch):
            raise SystemExit(f"torch {torch.found} does not export: " + "\n".join(missing))
        with tempfile.TemporaryDirectory() as folder:
            size = link(objects, torch, Path(folder)).stat().st_size
        seconds = time.perf_counter() - start
        print(
            f"torch {torch.found}: {len(SOURCES)} files, {size / 1e6:.1f} MB linked for macOS "
            f"arm64 in {seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main(sys.argv[1:])
