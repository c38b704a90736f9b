# SPDX-License-Identifier: Apache-2.0
"""Builds csrc/ into minference_vllm/_hopper.so where nvcc is at hand; all else is in pyproject.toml.

MINFERENCE_BUILD_CUDA: unset builds the library if it can be built, 1 insists on it, 0 leaves it out.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

VARIABLE = "MINFERENCE_BUILD_CUDA"
USUAL_CUDA = "/usr/local/cuda"  # where NVIDIA's installers and images put it, often without a place in PATH
OLDEST_NVCC = (12, 5)  # brings cudaGetDriverEntryPointByVersion
GPU = ("-gencode", "arch=compute_90a,code=sm_90a")
COMPILE = ("-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC", *GPU, "-c")
LINK = ("-shared", "-Xcompiler", "-fPIC", "-cudart", "static", *GPU)
SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cu"))


def find_nvcc() -> tuple[str, str]:
    """The nvcc to build with and no obstacle, or no nvcc and the obstacle."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"{VARIABLE}={wanted!r} is not allowed: 1 builds the CUDA library, 0 does not, unset decides.")
    if wanted == "0":
        return "", f"{VARIABLE}=0"
    home = os.environ.get("CUDA_HOME")
    folders = (*([f"{home}/bin"] if home else []), os.environ.get("PATH", os.defpath), f"{USUAL_CUDA}/bin")
    nvcc = shutil.which("nvcc", path=os.pathsep.join(folders))
    if not SOURCES:
        obstacle = "csrc/ holds no .cu file"
    elif not nvcc:
        obstacle = f"no nvcc in CUDA_HOME/bin, PATH or {USUAL_CUDA}/bin"
    else:
        obstacle = why_unfit(nvcc)
    if obstacle and wanted == "1":
        sys.exit(f"{VARIABLE}=1, but the CUDA library cannot be built: {obstacle}.")
    return ("", obstacle) if obstacle else (str(nvcc), "")


def why_unfit(nvcc: str) -> str:
    """Why this nvcc cannot build the library; empty if it can."""
    try:
        done = subprocess.run([nvcc, "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        return f"{nvcc} cannot be run ({error})"
    if done.returncode:
        return f"{nvcc} --version ended with status {done.returncode} ({' '.join(done.stdout.split())})"
    release = re.search(r"release (\d+)\.(\d+)", done.stdout)
    if release and tuple(map(int, release.groups())) >= OLDEST_NVCC:
        return ""
    found, needed = release[0] if release else "of an unknown release", ".".join(map(str, OLDEST_NVCC))
    return f"{nvcc} is {found}, and {needed} or newer is needed"


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(*command, f"\n{done.stdout}", flush=True)
    if done.returncode:
        sys.exit(f"nvcc failed with status {done.returncode}; its output is above. {VARIABLE}=0 installs without it.")


class BuildModules(build_py):
    """As usual, with a line where the library is left out.

    pip hides what a build prints unless it fails: `pip install -v` shows the line, plain `pip install` no more than
    the wheel's name, which then ends in none-any. The server's log says at start which kernels run, and why.
    """

    def run(self) -> None:
        if OBSTACLE:
            print(f"minference_vllm: CUDA library for H100 and H200 not built ({OBSTACLE}); Triton will serve.")
        super().run()


class BuildLibrary(build_ext):
    """One nvcc for each source, side by side, and one to link."""

    def get_ext_filename(self, fullname: str) -> str:
        # No CPython in the name: ctypes loads it.
        return f"{fullname.replace('.', os.sep)}.so"

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        objects = [str(Path(self.build_temp, source).with_suffix(".o")) for source in ext.sources]
        for directory in (library.parent, Path(objects[0]).parent):
            directory.mkdir(parents=True, exist_ok=True)
        commands = [(NVCC, *COMPILE, source, "-o", name) for source, name in zip(ext.sources, objects, strict=True)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))  # list: a failure is raised when its result is asked for
        run((NVCC, *LINK, "-o", str(library), *objects))


class PlatformWheel(bdist_wheel):
    """Bound to a platform where it holds the library, never to a CPython."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


NVCC, OBSTACLE = find_nvcc()
setup(
    ext_modules=[Extension("minference_vllm._hopper", SOURCES)] if NVCC else [],
    cmdclass={"build_py": BuildModules, "build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
