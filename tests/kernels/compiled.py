# SPDX-License-Identifier: Apache-2.0
"""Compiles for Hopper the Triton kernels that read FP8, and prints what each multiplies on the tensor cores; run by
test_warm_up.py, needs no GPU.

The interpreter, which the other tests run under without a GPU, has no types, and takes what the compiler refuses.
"""

import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from minference_vllm.chunk import FP8
from minference_vllm.config import MInferenceConfig
from minference_vllm.ops import Kernel
from minference_vllm.runtime import Runtime
from tests.kernels.cases import Case

CASE = Case("", head_dim=128, dtype=torch.bfloat16, has_fp8_kv=True, has_fp8_q=True, has_sinks=True)
METHODS: list[dict[str, object]] = [{"name": "block", "score_dtype": "fp8"}, {"name": "vertical_slash"}]
PRODUCT = re.compile(r"wgmma\.mma_async\S*\.f32\.(\w+)\.(\w+)")
NOT_INTERPRETED = {"UPCAST": False, "INTERPRETED": False}


def compiler(found: set[str]):
    """A stand-in for JITFunction.run that compiles kernels which are given FP8 and notes their products."""
    compile_or_run = JITFunction.run

    def run(self: JITFunction, *args, grid, warmup, **kwargs) -> None:
        if any(isinstance(value, torch.Tensor) and value.dtype == FP8 for value in args):
            kwargs |= {name: value for name, value in NOT_INTERPRETED.items() if name in kwargs}
            ptx = compile_or_run(self, *args, grid=grid, warmup=True, **kwargs).asm["ptx"]
            products = sorted({"*".join(operands) for operands in PRODUCT.findall(ptx)})
            found.add(" ".join([self.fn.__qualname__, *products]))

    return run


def main() -> None:
    target = GPUTarget("cuda", 90, 32)
    current = {"target": target, "device": 0}
    driver = {f"get_current_{name}": lambda value=value: value for name, value in current.items()}
    triton.runtime.driver.set_active(SimpleNamespace(**driver, get_current_stream=lambda device: 0))
    found: set[str] = set()
    JITFunction.run = compiler(found)
    for method in METHODS:
        runtime = Runtime(MInferenceConfig.model_validate({"method": method}), torch.device("cpu"), publish=False)
        runtime.method.kernel = Kernel.TRITON
        runtime.dry_run(replace(CASE.shape, max_seq_len=4096, max_chunk=2048), CASE.page_size)
    sys.stdout.write("\n".join(sorted(found)))


if __name__ == "__main__":
    main()
