# SPDX-License-Identifier: Apache-2.0
"""Kernel tests without a GPU run under Triton's interpreter, or on an emulated one."""

import os
import sys

import pytest
import torch

from minference_vllm.kernels.triton import probe
from tests.emulator.build import Build, can_leave_out
from tests.kernels.breaks import BREAKS
from tests.kernels.emulated import Emulated


@pytest.fixture(autouse=True)
def few_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one after another, so each costs time; two key ranges stand for thirty-two."""
    if device.type == "cpu":
        monkeypatch.setattr(sys.modules[probe.__module__], "PROBE_SPLITS", 2)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The CUDA kernels that attend and probe, such that tests can break them."""
    edits = [can_leave_out(number, *statements) for number, statements in enumerate(BREAKS)]
    # The folder of all processes that test; without pytest-xdist there is one, whose own it is.
    folder = tmp_path_factory.getbasetemp()
    return Build((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "emulated", edits)


@pytest.fixture
def emulated(build: Build, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return Emulated(build.functions, monkeypatch)
