# SPDX-License-Identifier: Apache-2.0
"""Compiles all Triton kernels for Hopper and Ampere. Prints, for kernels that are given FP8, which types they multiply
on the tensor cores. Run by test_warm_up.py; needs no GPU.

Without a GPU the other tests use Triton's interpreter, which has no types and accepts what the compiler refuses.
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

IN_FP8 = Case("", head_dim=128, dtype=torch.bfloat16, has_fp8_kv=True, has_fp8_q=True, has_sinks=True)
IN_FP16 = Case("", head_dim=64, dtype=torch.float16)
FAST: list[dict[str, object]] = [{"name": "block", "score_dtype": "fp8"}, {"name": "vertical_slash"}]
OTHERS: list[dict[str, object]] = [
    {"name": "block"},
    {"name": "block", "coarse_from": 0, "rows_per_list": 64},
    {"name": "vertical_slash", "probe_rows": "both", "share": 0.9},
]
RUNS = [(90, IN_FP8, FAST), (90, IN_FP16, OTHERS), (80, IN_FP16, OTHERS)]
"""Compute capability (FP8 needs 8.9), the case that is read, and the methods that read it."""
PRODUCT = re.compile(r"wgmma\.mma_async\S*\.f32\.(\w+)\.(\w+)")
NOT_INTERPRETED = {"UPCAST": False, "INTERPRETED": False}


def compiler(found: dict[str, set[str]]):
    """A stand-in for JITFunction.run that compiles in place of launching.

    Args:
        found: receives, by kernel, the types of the products in variants that are given FP8.
    """
    compile_or_run = JITFunction.run

    def run(self: JITFunction, *args, grid, warmup, **kwargs) -> None:
        kwargs |= {name: value for name, value in NOT_INTERPRETED.items() if name in kwargs}
        ptx = compile_or_run(self, *args, grid=grid, warmup=True, **kwargs).asm["ptx"]
        products = found.setdefault(self.fn.__qualname__, set())
        if any(isinstance(value, torch.Tensor) and value.dtype == FP8 for value in args):
            products |= {"*".join(operands) for operands in PRODUCT.findall(ptx)}

    return run


def set_target(capability: int) -> None:
    # Each capability counts as a device of its own, because Triton keeps compiled kernels by device.
    current = {"target": GPUTarget("cuda", capability, 32), "device": capability}
    driver = {f"get_current_{name}": lambda value=value: value for name, value in current.items()}
    triton.runtime.driver.set_active(SimpleNamespace(**driver, get_current_stream=lambda device: 0))


def main() -> None:
    found: dict[str, set[str]] = {}
    JITFunction.run = compiler(found)
    for capability, case, methods in RUNS:
        set_target(capability)
        for method in methods:
            runtime = Runtime(MInferenceConfig.model_validate({"method": method}), torch.device("cpu"), publish=False)
            runtime.method.kernel = Kernel.TRITON
            runtime.dry_run(replace(case.shape, max_seq_len=4096, max_chunk=2048), case.page_size)
    sys.stdout.write("\n".join(" ".join([name, *sorted(products)]) for name, products in sorted(found.items())))


if __name__ == "__main__":
    main()
