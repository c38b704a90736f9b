# SPDX-License-Identifier: Apache-2.0
"""Whether a wheel carries the CUDA library, and when an installation stops instead; with a stand-in for nvcc."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = "minference_vllm/_hopper.so"
NVCC = """#!/bin/sh
[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}.1" && exit
while [ $# -gt 0 ]; do
    case "$1" in
        -o) shift; output=$1 ;;
        *.cu) grep -H broken "$1" && exit 2 ;;
    esac
    shift
done
echo made >"$output"
"""

Build = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a source distribution holds, with kernels of no meaning."""
    tree = tmp_path / "tree"
    (tree / "minference_vllm").mkdir(parents=True)
    (tree / "csrc").mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    shutil.copy(ROOT / "minference_vllm/__init__.py", tree / "minference_vllm")
    for name in ("one.cu", "two.cu", "shared.cuh"):
        (tree / "csrc" / name).write_text("fine\n")
    return tree


def install_nvcc(folder: Path, release: str = "13.0") -> None:
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(release=release))
    nvcc.chmod(0o755)


@pytest.fixture
def build(tree: Path, tmp_path: Path) -> Build:
    """Build a wheel, with the nvcc of folder `cuda`, if there is one, and no other."""

    def run(wanted: str | None = None) -> subprocess.CompletedProcess[str]:
        environ = {k: v for k, v in os.environ.items() if k != "MINFERENCE_BUILD_CUDA"}
        environ |= {"CUDA_HOME": str(tmp_path / "cuda"), "PATH": "/usr/bin:/bin"}
        environ |= {} if wanted is None else {"MINFERENCE_BUILD_CUDA": wanted}
        command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
        return subprocess.run(command, cwd=tree, env=environ, capture_output=True, text=True)

    if shutil.which("nvcc", path="/usr/bin:/bin"):
        pytest.skip("an nvcc lies among the system's programs")
    return run


def wheel(tree: Path) -> tuple[str, bool]:
    """Tags of the only wheel, and whether it carries the library."""
    (path,) = (tree / "dist").iterdir()
    with ZipFile(path) as content:
        return path.stem.split("-", 2)[2], LIBRARY in content.namelist()


@pytest.mark.parametrize("wanted", [None, "", "1"])
def test_with_nvcc_the_wheel_carries_the_library(wanted: str | None, build: Build, tree: Path, tmp_path: Path) -> None:
    install_nvcc(tmp_path / "cuda")
    assert build(wanted).returncode == 0
    tags, carries = wheel(tree)
    assert tags.startswith("py3-none-linux_")
    assert carries


@pytest.mark.parametrize(
    ("release", "wanted", "why"),
    [
        pytest.param(None, None, "no nvcc in CUDA_HOME/bin or PATH", id="no nvcc"),
        pytest.param("12.2", None, "nvcc is version 12.2, and ", id="old nvcc"),
        pytest.param("13.0", "0", "MINFERENCE_BUILD_CUDA=0", id="left out"),
    ],
)
def test_without_the_library_the_wheel_is_for_any_machine(
    release: str | None, wanted: str | None, why: str, build: Build, tree: Path, tmp_path: Path
) -> None:
    if release:
        install_nvcc(tmp_path / "cuda", release)
    built = build(wanted)
    assert built.returncode == 0
    (line,) = [line for line in built.stdout.splitlines() if "not built" in line]
    assert why in line
    assert line.endswith("Triton will serve.")
    assert wheel(tree) == ("py3-none-any", False)


def test_what_cannot_be_built_and_is_insisted_on_stops(build: Build, tree: Path) -> None:
    stopped = build("1")
    assert stopped.returncode != 0
    assert "MINFERENCE_BUILD_CUDA=1, but the CUDA library cannot be built: no nvcc" in stopped.stderr
    assert not (tree / "dist").exists()


def test_a_failing_nvcc_stops_and_is_quoted(build: Build, tree: Path, tmp_path: Path) -> None:
    install_nvcc(tmp_path / "cuda")
    (tree / "csrc/two.cu").write_text("broken here\n")
    stopped = build()
    assert stopped.returncode != 0
    assert "csrc/two.cu:broken here" in stopped.stdout
    assert "nvcc failed with status 2" in stopped.stderr
    assert not (tree / "dist").exists()


@pytest.mark.parametrize("wanted", ["yes", "2", "auto"])
def test_another_value_is_refused(wanted: str, build: Build) -> None:
    stopped = build(wanted)
    assert stopped.returncode != 0
    assert f"MINFERENCE_BUILD_CUDA={wanted!r} is not allowed" in stopped.stderr
