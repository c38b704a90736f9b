# SPDX-License-Identifier: Apache-2.0
"""compute-sanitizer finds nothing in the CUDA kernels."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minference_vllm.kernels.cuda import library

SANITIZER = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
# Only our own kernels are checked. With torch's, which compute the expected results, a run would take minutes.
KERNELS = (
    "attend_kernel", "lse_kernel", "mass_kernel",  # the probe and the scores each have a mass_kernel
    "select_kernel", "boxes_kernel",
)  # fmt: skip
FILTERS = [option for kernel in KERNELS for option in ("--kernel-name", f"kernel_substring={kernel}")]


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer, which comes with CUDA")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool: str) -> None:
    names = library.PATH.read_bytes()
    assert all(kernel.encode() in names for kernel in KERNELS), "a filter that no kernel passes would check nothing"
    done = subprocess.run(
        [
            str(SANITIZER),
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            *FILTERS,
            sys.executable,
            "-m",
            "tests.kernels.sanitized",
        ],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,  # for a kernel that waits for ever; shorter than the timeout of a test
    )
    assert done.returncode == 0 and "SUMMARY: 0 " in done.stdout, done.stdout[-4000:]
