# SPDX-License-Identifier: Apache-2.0
"""What is compiled before the first request is all that a request will need."""

import os
import subprocess
import sys

import pytest
import torch


def test_no_request_selects_a_kernel_variant_that_the_dry_run_did_not() -> None:
    # In a process of its own: the interpreter, which the tests run under without a GPU, has no variants.
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.variants"], env=environ, capture_output=True, text=True, check=True
    )
    assert result.stdout == "50 launches checked\n"


@pytest.mark.gpu
def test_warm_up_is_not_counted_as_work() -> None:
    from minference_vllm.config import MInferenceConfig
    from minference_vllm.runtime import Runtime
    from minference_vllm.workspace import Geometry

    config = MInferenceConfig()
    runtime = Runtime(config, torch.device("cuda"), publish=False)
    geometry = Geometry(4, 4096, 4096, sum(config.probe_counts), config.vertical_size)
    runtime.warm_up(2, 64, 16, torch.bfloat16, geometry)
    assert runtime.workspace(geometry).kept_pairs.item() == 0
