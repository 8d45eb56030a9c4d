"""The package as it is installed: which extension is loaded, and what the metadata promises."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch
from setuptools import Distribution

import torch_onebit
from torch_onebit import _load

ROOT = Path(__file__).parent.parent
BUILT = Path(torch_onebit.__path__[0]) / _load.EXTENSION

needs_sources = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="the sources are not here: an installed package"
)


@pytest.mark.parametrize(
    "contents, version, message",
    [
        (b"onebit was built for torch 2.13.0\0", "2.14.0+cpu", r"built for torch 2\.13\.0, and"),
        (b"onebit was built for torch 2.1.0\0", "2.13.0", r"built for torch 2\.1\.0, and"),
        (b"an extension from before the mark", "2.13.0", "built for torch an unknown version"),
    ],
)
def test_an_extension_for_another_torch_is_refused_unloaded(contents, version, message, tmp_path):
    extension = tmp_path / "_C.abi3.so"
    extension.write_bytes(b"\x7fELF..." + contents + b"...")
    with pytest.raises(ImportError, match=rf"{message}.*pip install --no-build-isolation"):
        _load.check_torch(extension, version)


@pytest.mark.parametrize("version", ["2.13.0", "2.13.1+cu130", "2.13.2.dev1"])
def test_patch_releases_and_local_versions_are_accepted(version, tmp_path):
    extension = tmp_path / "_C.abi3.so"
    extension.write_bytes(b"...onebit was built for torch 2.13.0\0...")
    _load.check_torch(extension, version)


def test_the_extension_says_what_it_was_built_for():
    _load.check_torch(BUILT, torch.__version__)
    with pytest.raises(ImportError, match="built for torch 2"):
        _load.check_torch(BUILT, "99.0")


@pytest.fixture
def clone(tmp_path):
    """A folder of unbuilt sources, beside the package that was installed from it in site."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    package, site = tmp_path / "clone" / "torch_onebit", tmp_path / "site" / "torch_onebit"
    shutil.copytree(torch_onebit.__path__[0], package, ignore=ignore)
    shutil.copytree(package, site)
    shutil.copy(BUILT, site)
    return package


def test_a_clone_uses_the_package_installed_from_it(clone, tmp_path):
    site = tmp_path / "site"
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("PYTHONSAFEPATH", None)
    command = [sys.executable, "-m", "torch_onebit", "info"]
    result = subprocess.run(
        command, cwd=clone.parent, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert str(site / "torch_onebit") in result.stdout


@pytest.mark.parametrize(
    "installed, message",
    [
        (True, r"installed in .*site.*has another model\.py: run `pip install"),
        (False, r"_C\.abi3\.so is not built: run `pip install"),
    ],
)
def test_a_clone_that_cannot_use_it_says_what_to_do(
    clone, installed, message, tmp_path, monkeypatch
):
    (clone / "model.py").write_text("# changed after pip install\n")
    monkeypatch.setattr(_load, "PACKAGE", clone)
    site = [str(tmp_path / "site")] if installed else []
    monkeypatch.setattr(sys, "path", [str(clone.parent), *site])
    with pytest.raises(ImportError, match=message):
        _load.load()


@pytest.fixture(scope="module")
def distribution() -> Distribution:
    """What setup.py and pyproject.toml say."""
    from distutils.core import run_setup  # setuptools brings its own

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return run_setup("setup.py", script_args=["--quiet"], stop_after="config")


@needs_sources
def test_an_old_setuptools_is_named(monkeypatch):
    """That of the environments which Python 3.11 makes, where --no-build-isolation finds it."""
    monkeypatch.setattr(setuptools, "__version__", "65.5.0")
    with pytest.raises(SystemExit, match="needs setuptools 77 or newer to build, and 65"):
        runpy.run_path(str(ROOT / "setup.py"))


@needs_sources
def test_the_wheel_is_for_every_python_and_one_torch(distribution):
    wheel = distribution.get_command_obj("bdist_wheel")
    wheel.ensure_finalized()
    assert wheel.get_tag()[:2] == ("cp310", "abi3")
    minor = ".".join(torch.__version__.split(".")[:2])
    assert [r for r in distribution.install_requires if "torch" in r] == [f"torch=={minor}.*"]


@needs_sources
def test_the_description_reads_without_the_repository(distribution):
    text = distribution.metadata.get_long_description()
    assert "[" in (ROOT / "README.md").read_text()  # there are links to look at
    assert not re.search(r"\]\((?!https?:|#)", text)
    for name in re.findall(r"\(`([\w./-]+\.md)`\)", text):
        assert (ROOT / name).exists()


@needs_sources
@pytest.mark.parametrize(
    "command, reason",
    [
        ("no-such-compiler -O1", "No such file"),
        (f"{sys.executable} -c 'raise SystemExit(\"no tools\")'", "no tools"),
    ],
)
def test_without_a_compiler_the_build_ends_in_one_sentence(
    distribution, command, reason, monkeypatch
):
    monkeypatch.setenv("CXX", command)
    build = distribution.get_command_obj("build_ext")
    with pytest.raises(SystemExit) as raised:
        build.run()
    text = str(raised.value)
    assert re.search(rf"^torch_onebit needs a C\+\+20 compiler.*{reason}", text)
    assert "\n" not in text
