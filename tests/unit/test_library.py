# SPDX-License-Identifier: Apache-2.0
"""Launching what the CUDA library holds."""

import ctypes

import pytest
import torch

from minference_vllm.kernels.cuda import library


class NoArguments(ctypes.Structure):
    pass


def test_a_kernel_is_not_launched_on_another_device_than_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", dict)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(RuntimeError, match="tensors are on cuda:1, the current device is cuda:0"):
        library.launch("minference_attend", NoArguments(), torch.device("cuda", 1))
