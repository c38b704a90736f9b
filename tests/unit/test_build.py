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
echo "made by $0" >"$output"
"""
GOOD_NVCC = NVCC.format(release="13.0")
BROKEN_NVCC = "#!/bin/sh\necho no libc >&2\nexit 3\n"

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
    shutil.copytree(ROOT / "minference_vllm/patterns", tree / "minference_vllm/patterns")
    # A machine may have a CUDA of its own there.
    usual, setup = '"/usr/local/cuda"', tree / "setup.py"
    assert setup.read_text().count(usual) == 1
    setup.write_text(setup.read_text().replace(usual, repr(str(tmp_path / "usual"))))
    for name in ("one.cu", "two.cu", "shared.cuh"):
        (tree / "csrc" / name).write_text("fine\n")
    return tree


def install_nvcc(folder: Path, program: str = GOOD_NVCC) -> None:
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(program)
    nvcc.chmod(0o755)


@pytest.fixture
def build(tree: Path, tmp_path: Path) -> Build:
    """Build a wheel, where CUDA_HOME is folder `cuda`, PATH holds folder `path/bin` and /usr/local/cuda is `usual`."""

    def run(wanted: str | None = None) -> subprocess.CompletedProcess[str]:
        environ = {k: v for k, v in os.environ.items() if k != "MINFERENCE_BUILD_CUDA"}
        environ |= {"CUDA_HOME": str(tmp_path / "cuda"), "PATH": f"{tmp_path / 'path/bin'}:/usr/bin:/bin"}
        environ |= {} if wanted is None else {"MINFERENCE_BUILD_CUDA": wanted}
        command = [sys.executable, "setup.py", "-q", "bdist_wheel"]
        return subprocess.run(command, cwd=tree, env=environ, capture_output=True, text=True)

    if shutil.which("nvcc", path="/usr/bin:/bin"):
        pytest.skip("an nvcc lies among the system's programs")
    return run


def wheel(tree: Path) -> tuple[str, str]:
    """Tags of the only wheel, and what the library in it holds; empty without one."""
    (path,) = (tree / "dist").iterdir()
    with ZipFile(path) as content:
        library = content.read(LIBRARY).decode() if LIBRARY in content.namelist() else ""
        return path.stem.split("-", 2)[2], library


def test_a_wheel_carries_every_pattern_file(build: Build, tree: Path) -> None:
    assert build("0").returncode == 0
    (path,) = (tree / "dist").iterdir()
    with ZipFile(path) as content:
        carried = {Path(name).name for name in content.namelist() if name.startswith("minference_vllm/patterns/files/")}
    assert carried == {path.name for path in (ROOT / "configs/patterns").glob("*.json")} != set()


@pytest.mark.parametrize("wanted", [None, "", "1"])
def test_with_nvcc_the_wheel_carries_the_library(wanted: str | None, build: Build, tree: Path, tmp_path: Path) -> None:
    install_nvcc(tmp_path / "cuda")
    assert build(wanted).returncode == 0
    tags, library = wheel(tree)
    assert tags.startswith("py3-none-linux_")
    assert library == f"made by {tmp_path}/cuda/bin/nvcc\n"


@pytest.mark.parametrize("found", [["cuda", "path", "usual"], ["path", "usual"], ["usual"]], ids=" ".join)
def test_cuda_home_comes_before_path_and_the_usual_place_last(
    found: list[str], build: Build, tree: Path, tmp_path: Path
) -> None:
    for folder in found:
        install_nvcc(tmp_path / folder)
    assert build().returncode == 0
    assert wheel(tree)[1] == f"made by {tmp_path}/{found[0]}/bin/nvcc\n"


@pytest.mark.parametrize(
    ("program", "wanted", "why"),
    [
        pytest.param(None, None, "no nvcc in CUDA_HOME/bin, PATH or ", id="no nvcc"),
        pytest.param(NVCC.format(release="12.2"), None, "nvcc is release 12.2, and 12.5 or newer is", id="old nvcc"),
        pytest.param("#!/bin/sh\n", None, "nvcc is of an unknown release, and ", id="nvcc without a release"),
        pytest.param("#!/no/shell\n", None, "nvcc cannot be run (", id="nvcc that does not start"),
        pytest.param(BROKEN_NVCC, None, "nvcc --version ended with status 3 (no libc)", id="nvcc that fails"),
        pytest.param(GOOD_NVCC, "0", "MINFERENCE_BUILD_CUDA=0", id="left out"),
    ],
)
def test_without_the_library_the_wheel_is_for_any_machine(
    program: str | None, wanted: str | None, why: str, build: Build, tree: Path, tmp_path: Path
) -> None:
    if program:
        install_nvcc(tmp_path / "cuda", program)
    built = build(wanted)
    assert built.returncode == 0
    (line,) = [line for line in built.stdout.splitlines() if "not built" in line]
    assert why in line
    assert line.endswith("Triton will serve.")
    assert wheel(tree) == ("py3-none-any", "")


@pytest.mark.parametrize(
    ("program", "why"),
    [
        pytest.param(None, "no nvcc in ", id="no nvcc"),
        pytest.param(BROKEN_NVCC, "{cuda}/bin/nvcc --version ended with status 3", id="nvcc that fails"),
    ],
)
def test_what_cannot_be_built_and_is_insisted_on_stops(
    program: str | None, why: str, build: Build, tree: Path, tmp_path: Path
) -> None:
    if program:
        install_nvcc(tmp_path / "cuda", program)
    stopped = build("1")
    assert stopped.returncode != 0
    why = why.format(cuda=tmp_path / "cuda")
    assert f"MINFERENCE_BUILD_CUDA=1, but the CUDA library cannot be built: {why}" in stopped.stderr
    assert not (tree / "dist").exists()


def test_a_failing_nvcc_stops_and_is_quoted(build: Build, tree: Path, tmp_path: Path) -> None:
    install_nvcc(tmp_path / "cuda")
    (tree / "csrc/two.cu").write_text("broken here\n")
    stopped = build()
    assert stopped.returncode != 0
    assert "csrc/two.cu:broken here" in stopped.stdout
    assert "nvcc failed with status 2" in stopped.stderr
    assert "MINFERENCE_BUILD_CUDA=0 installs without it." in stopped.stderr
    assert not (tree / "dist").exists()


@pytest.mark.parametrize("wanted", ["yes", "2", "auto"])
def test_another_value_is_refused(wanted: str, build: Build) -> None:
    stopped = build(wanted)
    assert stopped.returncode != 0
    assert f"MINFERENCE_BUILD_CUDA={wanted!r} is not allowed" in stopped.stderr
