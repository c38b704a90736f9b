# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel that scores means of keys, on a GPU; test_emulated_masses.py has more tests of it, without one."""

from dataclasses import replace

import pytest
import torch

from minference_vllm import reference
from minference_vllm.boxes import BOX_MEAN
from minference_vllm.chunk import Chunk
from minference_vllm.index import GROUPS_PER_TILE, HALVES
from minference_vllm.kernels import cuda, triton
from minference_vllm.reference.normalisers import PART
from tests.kernels.blocks import (
    BF16,
    CASES,
    GPU_CASES,
    make_boxes,
    make_coarse,
    make_lse,
    make_masses,
    make_means,
    score_dtypes,
)  # fmt: skip
from tests.kernels.cases import Case, make_chunk

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]

# A mass that lies midway between two codes may be rounded to either. Of products in FP8 the sums are in fp16.
ROUNDED_OTHERWISE = {False: 0.03, True: 0.08}

OF_64 = [replace(case, head_dim=64) for case in (CASES[0], CASES[6])]
OF_128 = [replace(case, head_dim=128) for case in (*CASES[:7], *GPU_CASES)]


def check(chunk: Chunk, is_fp8: bool, rows_per_half: int = 32) -> torch.Tensor:
    """Codes of the kernel, the same each time, against the reference's."""
    means, lse = make_means(chunk, is_fp8=is_fp8), make_lse(chunk, rows_per_half)
    reference.row_normalisers(chunk, means, lse)
    assert cuda.masses.supports(chunk, means.dtype, rows_per_half)
    expected, actual, again = (make_masses(chunk, chunk.num_qo_heads, rows_per_half) for _ in range(3))
    reference.group_masses(chunk, means, lse, expected)
    cuda.masses.group_masses(chunk, means, lse, actual)
    cuda.masses.group_masses(chunk, means, lse, again)
    assert torch.equal(actual, again)
    parts_per_tile = HALVES * rows_per_half // PART
    tile = torch.arange(actual.shape[1], device=actual.device)[:, None] // parts_per_tile
    before = torch.arange(actual.shape[2], device=actual.device) < (chunk.first_tile + tile) * GROUPS_PER_TILE
    before &= tile < chunk.num_tiles
    difference = (actual.int() - expected.int()).abs()
    assert (difference <= before).all(), "codes differ by more than one, or were written where none belong"
    assert difference.sum() <= ROUNDED_OTHERWISE[is_fp8] * before.sum() * len(actual)
    return actual[:, before]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in OF_64])
def test_masses_of_heads_of_64(case: Case, device: torch.device) -> None:
    check(make_chunk(case, device), is_fp8=False)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in OF_128])
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@score_dtypes
def test_masses_of_heads_of_128(case: Case, dtype: torch.dtype, is_fp8: bool, device: torch.device) -> None:
    check(make_chunk(replace(case, dtype=dtype), device), is_fp8)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in OF_64 + OF_128])
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@score_dtypes
def test_masses_of_queries_in_fp8(case: Case, dtype: torch.dtype, is_fp8: bool, device: torch.device) -> None:
    if is_fp8 and case.head_dim != cuda.masses.FP8_HEAD_DIM:
        pytest.skip("means of these heads stay in the model's dtype")
    check(make_chunk(replace(case, dtype=dtype, has_fp8_kv=True, has_fp8_q=True, per_head=True), device), is_fp8)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in GPU_CASES])
@score_dtypes
def test_masses_of_boxes_and_in_boxes(case: Case, is_fp8: bool, device: torch.device) -> None:
    chunk = make_chunk(replace(case, head_dim=128), device)
    means, lse = make_means(chunk, is_fp8=is_fp8), make_lse(chunk, 32)
    reference.row_normalisers(chunk, means, lse)
    coarse, heads = make_coarse(chunk, means), chunk.num_qo_heads
    expected, actual = (make_masses(chunk, heads, 32) for _ in range(2))
    reference.group_masses(chunk, coarse, lse, expected, BOX_MEAN)
    cuda.masses.group_masses(chunk, coarse, lse, actual, BOX_MEAN)
    difference = (actual.int() - expected.int()).abs()
    assert difference.max() == 1 and (difference > 0).float().mean() < ROUNDED_OTHERWISE[is_fp8]
    boxes = make_boxes(chunk, 32, 20)  # far fewer than all
    share = torch.full((heads,), 0.2, device=device)
    whole, some = (make_masses(chunk, heads, 32) for _ in range(2))
    triton.select_boxes(actual, chunk, share, 32, 1, 1, boxes, some)
    cuda.masses.group_masses(chunk, means, lse, whole)
    cuda.masses.group_masses(chunk, means, lse, some, boxes=boxes)
    # Masses outside the chosen boxes are 0, written by select_boxes; the others are what they would be without boxes.
    assert ((some == whole) | (some == 0)).all()
    assert boxes.counts[:-1, :-1].max() < chunk.first_tile, "not all boxes are listed"


@pytest.mark.parametrize("rows_per_half", [16, 64])
def test_masses_of_more_or_fewer_rows(rows_per_half: int, device: torch.device) -> None:
    check(make_chunk(replace(OF_128[0], dtype=BF16), device), True, rows_per_half)


@score_dtypes
def test_no_far_key_counts_more_than_all_that_the_normaliser_has_seen(is_fp8: bool, device: torch.device) -> None:
    chunk = make_chunk(replace(OF_128[0], context_len=1024, dtype=BF16), device)
    # The hardware rounds sums of FP8 products to some 14 bits, which would show in larger scores.
    codes = check(replace(chunk, q=chunk.q * (10 if is_fp8 else 100)), is_fp8)
    assert codes.max() > 208
