# SPDX-License-Identifier: Apache-2.0
"""Everything that a request needs is compiled before the first request."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minference_vllm.scratch import ScratchShape

ROOT = Path(__file__).parents[2]


def output_of(module: str) -> str:
    """What a program prints. It runs in a process of its own, because Triton's interpreter, which the tests use without
    a GPU, has no variants and compiles nothing.
    """
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", module], env=environ, capture_output=True, text=True, check=True
    ).stdout


def test_no_request_selects_a_kernel_variant_that_the_dry_run_did_not() -> None:
    assert output_of("tests.kernels.variants") == "878 launches checked\n"


def kernels() -> set[str]:
    """The names of all Triton kernels of the package: those of its jitted functions that are launched."""
    sources = (ROOT / "minference_vllm" / "kernels" / "triton").glob("*.py")
    return {name for source in sources for name in re.findall(r"^def (_\w+_kernel)\(", source.read_text(), re.M)}


def test_all_kernels_compile_and_multiply_fp8_as_it_is() -> None:
    compiled = [line.split(" ", 1) for line in output_of("tests.kernels.compiled").splitlines()]
    assert {name for name, *_ in compiled} == kernels()
    assert {name: products for name, *rest in compiled for products in rest} == {
        "_attend_heads_kernel": "e4m3*e4m3 f16*f16",
        "_attend_kernel": "e4m3*e4m3 f16*f16",
        "_attend_tiles_kernel": "e4m3*e4m3 f16*f16",
        "_masses_kernel": "e4m3*e4m3",
        "_normalisers_kernel": "e4m3*e4m3",
        "_probe_lse_kernel": "e4m3*e4m3",
        "_probe_mass_kernel": "e4m3*e4m3",
    }


@pytest.mark.gpu
def test_warm_up_is_not_counted_as_work() -> None:
    from minference_vllm.config import MInferenceConfig
    from minference_vllm.runtime import Runtime

    runtime = Runtime(MInferenceConfig(), torch.device("cuda"), publish=False)
    shape = ScratchShape(4, 2, 64, torch.bfloat16, max_seq_len=4096, max_chunk=4096)
    runtime.warm_up(shape, page_size=16)
    assert runtime.layer_state(shape, 0, 1).attend.kept_pairs.item() == 0
