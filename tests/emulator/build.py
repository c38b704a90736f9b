# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA kernels of csrc/ with g++ into a library for the CPU; the headers beside this file emulate the GPU.

Only what g++ cannot read is changed in the sources: launches, dynamic shared memory, one PTX instruction.
"""

import ctypes
import fcntl
import functools
import re
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
# The headers that wrap PTX and the driver; headers of the same names in this folder replace them.
REPLACED = ("hopper.cuh", "tensor_map.cuh")
FLAGS = (
    "-std=c++20", "-O2", "-march=native", "-fno-strict-aliasing", "-shared", "-fPIC", "-Wno-unknown-pragmas",
    "-fno-gnu-unique",  # several such libraries may be loaded at once
)  # fmt: skip


class Edit(NamedTuple):
    """A pattern that occurs exactly once in a file of csrc/, and its replacement."""

    file: str
    pattern: str
    replacement: str


SHARED_MEMORY = r"extern __shared__ char raw\[\];", "char* const raw = emulator::shared_memory;"
LAUNCH = (
    r"kernel<<<(.*), THREADS, (\w+), stream>>>\((.*?)\);",
    r"emulator::launch(\1, THREADS, \2, [=] { kernel(\3); });",
)
NEEDED = (
    Edit("attend_kernel.cuh", *SHARED_MEMORY),
    Edit("attend_kernel.cuh", *LAUNCH),
    Edit("probe_lse.cuh", *SHARED_MEMORY),
    Edit("probe_mass.cuh", *SHARED_MEMORY),
    Edit("probe.cu", *LAUNCH),
    Edit("score_stages.cuh", *SHARED_MEMORY),
    Edit("score.cu", *LAUNCH),
    Edit("select.cuh", *SHARED_MEMORY),
    Edit("select.cuh", *LAUNCH),
    Edit("select_boxes.cuh", *SHARED_MEMORY),
    Edit("select_boxes.cuh", *LAUNCH),
    Edit("probe_sums.cuh", r'asm volatile\(.*?: "memory"\);', "*address += value;"),
)


def prepare(folder: Path, edits: Iterable[Edit]) -> None:
    """Copy the sources into `folder`, edited."""
    for path in (*CSRC.iterdir(), *HERE.glob("*.cuh"), HERE / "kernels.cpp"):
        if path.parent == HERE or path.name not in REPLACED:
            shutil.copy(path, folder)
    for edit in edits:
        path = folder / edit.file
        text, times = re.subn(edit.pattern, edit.replacement, path.read_text(), flags=re.DOTALL)
        assert times == 1, f"{edit.file}: {edit.pattern} is there {times} times"
        path.write_text(text)


def can_leave_out(number: int, file: str, statements: str) -> Edit:
    """The kernel skips `statements` when the library is told to leave out this number."""
    return Edit(file, re.escape(statements), f"if (emulator::left_out != {number}) {{ {statements} }}")


class Build:
    """A library that g++ compiles in the background; `functions` waits for it.

    Args:
        folder: several processes that test may share it: one of them compiles, the others wait.
        edits: changes with which tests can break the kernels.
        only: compile only this source. Without it, all sources that attend and probe are compiled.
    """

    def __init__(self, folder: Path, edits: Iterable[Edit] = (), only: str = "") -> None:
        folder.mkdir(exist_ok=True)
        self.path, self.lock, self.process = folder / "kernels.so", folder / "lock", None
        define = [f'-DONLY="{only}"'] if only else []
        command = ["g++", *FLAGS, *define, "-o", self.path, "kernels.cpp"]
        with self.lock.open("w") as lock, suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.path.exists():
                prepare(folder, (*NEEDED, *edits))
                # g++ inherits the lock, and holds it until it ends.
                self.process = subprocess.Popen(
                    command, cwd=folder, stderr=subprocess.PIPE, text=True, pass_fds=[lock.fileno()]
                )

    @functools.cached_property
    def functions(self) -> ctypes.CDLL:
        messages = "another process could not compile it"
        if self.process is not None:
            _, messages = self.process.communicate()
        with self.lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
        assert self.path.exists(), messages
        functions = ctypes.CDLL(str(self.path))
        functions.minference_error.restype = ctypes.c_char_p
        return functions
