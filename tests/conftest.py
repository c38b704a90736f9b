# SPDX-License-Identifier: Apache-2.0
"""Without a GPU the Triton kernels run under Triton's interpreter; the switch must be set before Triton is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from minference_vllm.kernels.cuda import library

    has_gpu = torch.cuda.is_available()
    has_hopper = has_gpu and torch.cuda.get_device_capability()[0] == 9
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        elif item.get_closest_marker("hopper") and not has_hopper:
            item.add_marker(pytest.mark.skip(reason="needs an H100 or H200"))
        elif item.get_closest_marker("hopper") and library.why_missing():
            item.add_marker(pytest.mark.skip(reason=library.why_missing()))
