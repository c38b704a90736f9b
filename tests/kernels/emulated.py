# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels that attend and probe, on the CPU."""

import ctypes

import pytest
import torch

from minference_vllm.kernels.cuda import library
from tests.kernels.breaks import BREAKS

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton takes tensors of the CPU in its interpreter only"
)
"""For tests that run Triton kernels beside emulated ones."""


class Emulated:
    """Stands for the library of CUDA kernels."""

    def __init__(self, functions: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
        self.functions = functions
        self.seed = 0
        self.left_out = -1
        monkeypatch.setattr(library, "enqueue", self.enqueue)
        # So few that a program goes through several tiles.
        monkeypatch.setattr(library, "num_multiprocessors", lambda device: 1 + self.seed % 3)

    def enqueue(self, function: str, arguments: ctypes.Structure, device: torch.device) -> None:
        self.functions.emulator_begin(self.seed, self.left_out)
        if error := self.functions[function](ctypes.byref(arguments), None):
            raise RuntimeError(f"{function}, seed {self.seed}: {self.functions.minference_error(error).decode()}")

    def leave_out(self, statements: tuple[str, str]) -> None:
        self.left_out = BREAKS.index(statements)
