# SPDX-License-Identifier: Apache-2.0
"""Prints the kernel variants that requests select and the dry run did not; run by test_warm_up.py, needs no GPU.

Triton chooses a variant by its arguments alone, so each launch is recorded in place of being compiled and run.
"""

import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from minference_vllm.attention import prefill
from minference_vllm.config import MInferenceConfig
from minference_vllm.methods import block_scratch
from minference_vllm.ops import Kernel
from minference_vllm.runtime import Runtime
from tests.kernels.cases import Case, make_chunk

MAX_LEN = 40_000
# Room for the masses of all heads at once, and of some; in the longest chunk not even of all heads of one KV head.
MASS_BYTES = (block_scratch.MASS_BYTES, 2**21)
METHODS: list[dict[str, object]] = [
    {"name": "block"},
    {"name": "block", "score_dtype": "fp8"},
    {"name": "block", "coarse_from": 16_000},
    {"name": "vertical_slash", "probe_rows": "both"},
    {"name": "vertical_slash", "share": 0.9},
]
REQUESTS = [
    Case("odd lengths", num_rows=1025, context_len=20_001),
    Case("aligned", num_rows=2048, context_len=32_768),
    Case("no context", num_rows=3000, context_len=0),
    Case("HND", num_rows=2000, context_len=17, layout="HND"),
    Case("one KV head", num_rows=2000, context_len=16_000, num_kv_heads=1),
    Case("FP8, one scale", num_rows=1025, context_len=20_001, has_fp8_kv=True, has_fp8_q=True),
    Case("FP8, a scale a head", num_rows=2048, context_len=32_768, has_fp8_kv=True, has_fp8_q=True, per_head=True),
    Case("FP8 under other queries", num_rows=2000, context_len=17, has_fp8_kv=True),
    Case("measured in parts that begin anywhere", num_rows=16_347, context_len=20_001),
    Case("sinks", num_rows=1025, context_len=20_001, has_sinks=True),
    Case("sinks in float32, FP8", num_rows=2048, context_len=32_768, has_fp32_sinks=True, has_fp8_kv=True),
]


def recorder(seen: set[tuple[str, str]]):
    """A stand-in for JITFunction.run that records the function and what it would be compiled for."""

    def run(self: JITFunction, *args, grid, warmup, **kwargs) -> None:
        binder = self.device_caches[0][4]
        _, specialization, options = binder(*args, **kwargs, debug=False)
        seen.add((self.fn.__qualname__, f"{specialization} {options}"))

    return run


def variants(case: Case, method: dict[str, object]) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """What the dry run selects, and what a request in a table of odd width selects."""
    config = MInferenceConfig.model_validate({"method": method})
    runtime = Runtime(config, torch.device("cpu"), publish=False)
    runtime.method.kernel = Kernel.TRITON
    shape = replace(case.shape, max_seq_len=MAX_LEN, max_chunk=max(8192, case.num_rows))
    compiled: set[tuple[str, str]] = set()
    JITFunction.run = recorder(compiled)
    runtime.dry_run(shape, case.page_size)
    requested: set[tuple[str, str]] = set()
    JITFunction.run = recorder(requested)
    prefill(make_chunk(case, torch.device("cpu")), runtime.method, runtime.layer_state(shape, 0, 1))
    return compiled, requested


def main() -> None:
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0))
    count = 0
    for case, method in itertools.product(REQUESTS, METHODS):
        for block_scratch.MASS_BYTES in MASS_BYTES if method["name"] == "block" else MASS_BYTES[:1]:
            compiled, requested = variants(case, method)
            count += len(requested)
            for name, variant in requested - compiled:
                sys.stdout.write(f"NEW in {case.name}, {method['name']}: {name} {variant}\n")
    sys.stdout.write(f"{count} launches checked\n")


if __name__ == "__main__":
    main()
