# SPDX-License-Identifier: Apache-2.0
"""Kernel tests without a GPU run under Triton's interpreter."""

import sys

import pytest
import torch

from minference_vllm.kernels.triton import probe


@pytest.fixture(autouse=True)
def few_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter pays for each program, and runs none side by side: two key ranges stand for thirty-two."""
    if device.type == "cpu":
        monkeypatch.setattr(sys.modules[probe.__module__], "PROBE_SPLITS", 2)
