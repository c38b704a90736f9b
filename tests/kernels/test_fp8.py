# SPDX-License-Identifier: Apache-2.0
"""Scores in FP8: how numbers are rounded, each kernel against its plain-torch twin, and the method's choice."""

from dataclasses import replace

import pytest
import torch

from minference_vllm import ops, reference
from minference_vllm.chunk import Chunk
from minference_vllm.kernels import triton
from minference_vllm.methods.block import Block, BlockSettings
from minference_vllm.methods.block_scratch import BlockScratch
from minference_vllm.ops import Kernel
from minference_vllm.reference.operands import from_operand, query_rows, to_operand
from minference_vllm.scratch import CENTRE_END, FP8, FP8_MAX, FP8_UNIT, ScratchShape
from tests.kernels.blocks import BF16, SPARSE, engines, every_case, make_lse, make_masses, make_means
from tests.kernels.cases import Case, make_chunk


def every_finite(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a 16-bit type."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    return numbers[numbers.isfinite()]


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_no_finite_number_becomes_another_kind_of_number(dtype: torch.dtype) -> None:
    numbers = every_finite(dtype)
    rounded = from_operand(to_operand(numbers, FP8))
    assert rounded.isfinite().all()
    assert rounded.abs().max() == FP8_MAX * FP8_UNIT == 1792
    assert (rounded[numbers.abs().float() > 1792].abs() == 1792).all()
    inside = numbers.float()[numbers.abs().float() <= 1792]
    # Half a unit in the last place: 3 bits follow the leading one, down to numbers of 2^-6.
    error = (from_operand(to_operand(inside, FP8)) - inside).abs()
    assert (error <= (inside.abs() / 16).clamp_min(FP8_UNIT * 2.0**-10)).all()


def test_queries_of_the_models_dtype_stay_as_they_are() -> None:
    q = every_finite(BF16)
    assert torch.equal(query_rows(q, torch.zeros(1, dtype=BF16)), q.float())
    assert torch.equal(query_rows(q, torch.zeros(1, dtype=FP8)), from_operand(to_operand(q, FP8)))


def means_of(chunk: Chunk, kernel: Kernel) -> torch.Tensor:
    means = torch.full((chunk.kv.num_kv_heads, chunk.seq_len // 4 + 3, chunk.head_dim), 7.0)
    means = means.to(chunk.q.device, FP8)
    ops.key_means(chunk.kv, chunk.seq_len, means, kernel)
    return means


@every_case
def test_means_of_keys(case: Case, device: torch.device) -> None:
    chunk = make_chunk(case, device)
    actual, expected = (means_of(chunk, kernel).float() for kernel in (Kernel.TRITON, Kernel.REFERENCE))
    # An average that lies midway between two numbers may be rounded to either.
    torch.testing.assert_close(actual, expected, rtol=2**-3, atol=2**-9)
    assert (actual != expected).float().mean() < 1e-3
    in_full = make_means(chunk)[:, : case.seq_len // 4].float()
    torch.testing.assert_close(actual[:, : case.seq_len // 4] * FP8_UNIT, in_full, rtol=0.07, atol=2**-7)
    assert (actual[:, case.seq_len // 4 :] == 7).all()


@engines
@pytest.mark.parametrize("size", [1791.0, 1793.0, 3e4, 8e37])
def test_means_past_the_largest_number_end_there(kernel: Kernel, size: float, device: torch.device) -> None:
    # So short that nothing is subtracted from the means.
    chunk = make_chunk(replace(SPARSE, dtype=BF16, num_rows=CENTRE_END - 1, context_len=0), device)
    chunk.kv.k[:] = size
    chunk.kv.k[..., 1::2] *= -1
    chunk.kv.k[..., 2] = 0
    means = means_of(chunk, kernel)[:, : chunk.seq_len // 4].float()
    assert (means[..., 2] == 0).all()
    assert (means[..., 4::2] == FP8_MAX).all()
    assert (means[..., 1::2] == -FP8_MAX).all()


@pytest.mark.parametrize("loudness", [0.0, 1e-3, 30.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
def test_masses_of_rows_and_keys_of_any_size(loudness: float, dtype: torch.dtype, device: torch.device) -> None:
    # By loudness: all numbers round to zero, most are subnormal, few saturate, most saturate.
    chunk = make_chunk(replace(SPARSE, dtype=dtype), device)
    chunk.kv.k.mul_(loudness)
    chunk = replace(chunk, q=chunk.q * loudness, scale=chunk.scale / max(1.0, loudness**2))
    means, results = make_means(chunk, is_fp8=True), []
    for engine in (reference, triton):
        lse, masses = make_lse(chunk), make_masses(chunk, chunk.num_qo_heads)
        engine.row_normalisers(chunk, means, lse)
        engine.group_masses(chunk, means, lse, masses)
        results.append((lse[:, : chunk.num_tiles * 2], masses[:, : chunk.num_tiles * 2, :16].int()))
    (expected_lse, expected), (lse, masses) = results
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)
    assert not lse.isnan().any()
    assert (masses - expected).abs().max() <= 1


def scratch(kernel: Kernel, **settings: object) -> BlockScratch:
    method = Block(BlockSettings.model_validate(settings), kernel)
    return method.scratch(ScratchShape(4, 2, 128, BF16, max_seq_len=1000, max_chunk=100), torch.device("meta"))


def test_scratch_holds_means_in_the_dtype_of_the_scores() -> None:
    assert scratch(Kernel.CUDA).means.dtype == FP8
    assert scratch(Kernel.CUDA, score_dtype="model").means.dtype == BF16
    assert scratch(Kernel.TRITON).means.dtype == BF16
    assert scratch(Kernel.TRITON, score_dtype="fp8").means.dtype == FP8
    assert scratch(Kernel.CUDA).means.nbytes * 2 == scratch(Kernel.TRITON).means.nbytes
