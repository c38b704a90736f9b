# SPDX-License-Identifier: Apache-2.0
"""Benchmarks over a cache in FP8: what they measure is the same prompt, and both engines get the same cache."""

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import DENSE, SPARSE, block, fidelity
from benchmarks.block_cases import TINY
from benchmarks.cases import Case as Shape
from benchmarks.cases import Inputs, in_fp8, make_inputs
from minference_vllm import ops
from minference_vllm.chunk import FP8
from minference_vllm.ops import Kernel
from minference_vllm.reference.quantized import keys_and_values, queries
from minference_vllm.scratch import AttendBuffers

CASE = TINY[0]


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return make_inputs(Shape(CASE.tokens, 1, 1, *CASE[3:]), torch.device("cpu"), 0)


def test_a_prompt_in_fp8_is_the_same_prompt(inputs: Inputs) -> None:
    plain, quantized = (block.make_chunk(CASE, of) for of in (inputs, in_fp8(inputs)))
    assert quantized.q.dtype == quantized.kv.k.dtype == FP8
    assert quantized.out.dtype == torch.bfloat16
    assert quantized.kv.k.stride() == plain.kv.k.stride()
    rows = slice(0, 50)
    pairs = [
        (queries(quantized, rows, 1), queries(plain, rows, 1)),
        *zip(keys_and_values(quantized.kv, CASE.tokens), keys_and_values(plain.kv, CASE.tokens), strict=True),
    ]
    for stored, expected in pairs:
        # Half of the last place, 3 bits after the leading one, and what bf16 has rounded before.
        torch.testing.assert_close(stored, expected, rtol=2**-4 + 2**-7, atol=1e-4)


@pytest.mark.parametrize("is_fp8", [False, True])
def test_the_check_before_timing_finds_a_scale_that_is_left_out(is_fp8: bool, inputs: Inputs) -> None:
    chunk = block.make_chunk(CASE, in_fp8(inputs) if is_fp8 else inputs)
    every = block.every_group(chunk)
    buffers = AttendBuffers.allocate(CASE.num_qo_heads, CASE.rows, chunk.q.device)
    ops.attend(chunk, every, buffers, Kernel.REFERENCE)
    assert block.error_of(chunk, every) < 1e-6
    chunk.out.mul_(2)
    assert block.error_of(chunk, every) > block.DENSE_FP8_TOLERANCE


def test_both_engines_of_fidelity_get_the_same_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["fidelity", "--model", "m", "--texts", "t", "--out", "o", "--kv-cache-dtype", "fp8"]
    monkeypatch.setattr(sys, "argv", arguments)
    options = fidelity.parse()
    spec = fidelity.make_spec(options, 8192, {"method": {"name": "block"}})
    given: list[str] = []
    monkeypatch.setattr("vllm.LLM", lambda **engine: given.append(engine["kv_cache_dtype"]), raising=False)
    monkeypatch.setattr("minference_vllm.plugin.register", lambda: None)
    monkeypatch.setattr("benchmarks.runtime", lambda: SimpleNamespace(is_broken=False))
    for kind in (DENSE, SPARSE):
        fidelity.load_engine(kind, spec)
    assert given == ["fp8", "fp8"]
