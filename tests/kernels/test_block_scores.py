# SPDX-License-Identifier: Apache-2.0
"""What `block` chooses by, each kernel against its plain-torch twin: means of keys, normalisers, masses of groups."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from minference_vllm import ops, reference
from minference_vllm.chunk import Chunk
from minference_vllm.index import GROUP, HALF, HALVES, TILE
from minference_vllm.kernels import triton
from minference_vllm.ops import Kernel
from minference_vllm.reference.codes import ONE, add, encode, weights
from minference_vllm.reference.masses import SQUARED, mean_weights
from minference_vllm.reference.normalisers import LIMIT, NORMALISER_KEYS, PART, sampled_rows
from minference_vllm.scratch import MASS_CODES
from tests.kernels.blocks import (
    BF16,
    CASES,
    SPARSE,
    engines,
    every_case,
    make_coarse,
    make_index,
    make_lse,
    make_masses,
    make_means,
    score_dtypes,
)  # fmt: skip
from tests.kernels.cases import Case, make_chunk


@every_case
@pytest.mark.parametrize("rows_per_half", [16, 32, 64])
def test_sampled_rows_lie_in_their_halves_and_in_the_chunk(case: Case, rows_per_half: int) -> None:
    chunk = make_chunk(case, torch.device("cpu"))
    rows = sampled_rows(chunk, rows_per_half)
    assert rows.shape == (chunk.num_tiles * HALVES, rows_per_half)
    for half, of_half in enumerate(rows, start=chunk.first_tile * HALVES):
        begin, end = max(half * HALF, case.context_len), min(half * HALF + HALF, case.seq_len)
        assert (of_half == -1).all() if begin >= end else ((of_half >= begin) & (of_half < end)).all()
        assert end - begin < HALF or len(of_half.unique()) == rows_per_half


@every_case
@score_dtypes
def test_normalisers(case: Case, is_fp8: bool, device: torch.device) -> None:
    check_normalisers(make_chunk(case, device), rows_per_half=32, is_fp8=is_fp8)


@pytest.mark.parametrize("rows_per_half", [16, 64])
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in (CASES[0], CASES[5], CASES[6])])
def test_normalisers_of_more_or_fewer_rows(case: Case, rows_per_half: int, device: torch.device) -> None:
    check_normalisers(make_chunk(case, device), rows_per_half)


@pytest.mark.parametrize(("num_rows", "context_len"), [(1, 0), (3, 0), (4, 0), (2, 256), (3, 128), (131, 128)])
def test_normalisers_where_a_tile_has_few_means_or_none(num_rows: int, context_len: int, device: torch.device) -> None:
    chunk = make_chunk(replace(SPARSE, num_rows=num_rows, context_len=context_len), device)
    lse = check_normalisers(chunk)
    last = lse[:, 2 * chunk.num_tiles - 2]
    # Every tile except the first counts the first keys; there is no mean at all before the fourth key.
    assert (last.isfinite() if chunk.seq_len >= 4 else last == -torch.inf).all()


def check_normalisers(chunk: Chunk, rows_per_half: int = 16, mean: int = 4, is_fp8: bool = False) -> torch.Tensor:
    means = make_means(chunk, mean, is_fp8)
    expected, actual = make_lse(chunk, rows_per_half), make_lse(chunk, rows_per_half)
    reference.row_normalisers(chunk, means, expected, mean)
    triton.row_normalisers(chunk, means, actual, mean)
    # On tensor cores a float32 product keeps ten bits of its operands.
    tolerance = 2e-2 if chunk.q.dtype == torch.float32 and not is_fp8 else 1e-3
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    return actual


@pytest.mark.parametrize("function", [reference.row_normalisers, triton.row_normalisers], ids=["reference", "triton"])
@pytest.mark.parametrize("context_len", [0, 100, 306])
def test_normalisers_count_the_tile_up_to_the_group_and_the_first_keys(
    function: Callable[..., None], context_len: int, device: torch.device
) -> None:
    chunk = make_chunk(replace(SPARSE, context_len=context_len), device)
    # All scores are 0, so the log-sum-exp is the logarithm of the number of keys.
    chunk = replace(chunk, q=torch.zeros_like(chunk.q))
    lse = make_lse(chunk)
    function(chunk, make_means(chunk), lse)
    for half, rows in enumerate(sampled_rows(chunk, 16)):
        counted = lse[:, half].exp() / LIMIT
        tile_start = (chunk.first_tile + half // HALVES) * TILE
        expected = ((rows // GROUP + 1) * GROUP).clamp(max=chunk.seq_len // 4 * 4) - tile_start
        expected = (expected + min(tile_start, NORMALISER_KEYS)).float().expand_as(counted)
        torch.testing.assert_close(counted, torch.where(rows < 0, torch.inf, expected), rtol=1e-4, atol=0)


@engines
@pytest.mark.parametrize("rows_per_half", [16, 64])
def test_all_mass_is_the_first_keys_where_the_tile_has_none(
    kernel: Kernel, rows_per_half: int, device: torch.device
) -> None:
    chunk = make_chunk(replace(SPARSE, num_rows=3, context_len=384), device)
    give_keys(chunk, 0.0)
    masses = masses_of(chunk, rows_per_half, kernel)
    # [heads, parts of the first half]
    mass = weights(masses[:, : rows_per_half // PART, : NORMALISER_KEYS // GROUP]).sum(2) / ONE
    # Each of 16 rows gives each of 16 means a sixteenth of its attention.
    torch.testing.assert_close(mass, torch.full_like(mass, 16 * 16 * mass_of(1 / 16)), rtol=0.05, atol=0)


@engines
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@score_dtypes
def test_no_far_key_counts_more_than_the_limit(
    kernel: Kernel, dtype: torch.dtype, is_fp8: bool, device: torch.device
) -> None:
    chunk = make_chunk(replace(SPARSE, context_len=384, dtype=dtype), device)
    give_keys(chunk, 0.0)
    give_keys(chunk, 30.0, 200, 204)  # one mean, which weighs e^30 times as much as another
    masses = masses_of(chunk, 16, kernel, is_fp8)[:, 0, : 384 // GROUP]
    mass = weights(masses) / ONE
    # Each of the rows has seen 64 keys and those of its tile, 16 to 64; any other group has four means of 4 keys.
    others = torch.cat([mass[:, :12], mass[:, 13:]], 1)
    least, most = (16 * 4 * mass_of(4 / seen) for seen in (128, 80))
    assert ((others > least * 0.95) & (others < most * 1.05)).all()
    expected = 16 + others[:, :1] * 12 / 16
    torch.testing.assert_close(mass[:, 12:13], expected, rtol=0.1, atol=0)
    give_keys(chunk, 30.0, 192, 208)
    assert (masses_of(chunk, 16, kernel, is_fp8)[:, 0, 12] == MASS_CODES - 1).all(), "four means of each of 16 rows: 64"


def mass_of(share: float) -> float:
    """What a row gives to a mean that has this share of the attention that its normaliser includes."""
    weight = mean_weights(torch.tensor(min(share / LIMIT, 1)).log2()).item()
    return (1 - SQUARED) * weight + SQUARED * weight**2


def give_keys(chunk: Chunk, score: float, begin: int = 0, end: int | None = None) -> None:
    """Let keys begin .. end - 1, or all, have the same score under all rows, each of which becomes (1, 0, 0, …)."""
    position = torch.arange(begin, chunk.seq_len if end is None else end, device=chunk.q.device)
    page_size = chunk.kv.k.shape[2]
    pages = chunk.kv.block_table[chunk.kv.row][position // page_size].long()
    chunk.q.zero_()
    chunk.q[:, :, 0] = 1
    chunk.kv.k[pages, :, position % page_size] = 0
    chunk.kv.k[pages, :, position % page_size, 0] = score / chunk.scale


def masses_of(chunk: Chunk, rows_per_half: int, kernel: Kernel, is_fp8: bool = False) -> torch.Tensor:
    means, lse = make_means(chunk, is_fp8=is_fp8), make_lse(chunk, rows_per_half)
    masses = make_masses(chunk, chunk.num_qo_heads, rows_per_half)
    ops.row_normalisers(chunk, means, lse, kernel)
    ops.group_masses(chunk, means, lse, masses, kernel)
    return masses


@every_case
@pytest.mark.parametrize("rows_per_half", [16, 32])
@score_dtypes
def test_masses_of_groups(case: Case, rows_per_half: int, is_fp8: bool, device: torch.device) -> None:
    chunk = make_chunk(case, device)
    means, lse = make_means(chunk, is_fp8=is_fp8), make_lse(chunk, rows_per_half)
    reference.row_normalisers(chunk, means, lse)
    check_masses(chunk, means, lse)


@pytest.mark.parametrize(("rows_per_half", "mean"), [(64, 4), (32, 32), (16, 32)])
def test_masses_of_other_rows_and_means(rows_per_half: int, mean: int, device: torch.device) -> None:
    chunk = make_chunk(SPARSE, device)
    fine, lse = make_means(chunk), make_lse(chunk, rows_per_half)
    reference.row_normalisers(chunk, fine, lse)
    means = fine if mean == 4 else make_coarse(chunk, fine)
    check_masses(chunk, means, lse, mean)


def test_masses_of_ranges_of_means(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minference_vllm.kernels.triton.masses.MEANS_EACH", 64)
    chunk = make_chunk(SPARSE, device)
    means, lse = make_means(chunk), make_lse(chunk)
    reference.row_normalisers(chunk, means, lse)
    check_masses(chunk, means, lse)


def check_masses(chunk: Chunk, means: torch.Tensor, lse: torch.Tensor, mean: int = 4) -> None:
    rows_per_half = lse.shape[2]
    expected, actual = (make_masses(chunk, chunk.num_qo_heads, rows_per_half) for _ in range(2))
    reference.group_masses(chunk, means, lse, expected, mean)
    triton.group_masses(chunk, means, lse, actual, mean)
    differ = 0
    parts_per_tile = HALVES * rows_per_half // PART
    for part in range(chunk.num_tiles * parts_per_tile):
        groups = (chunk.first_tile + part // parts_per_tile) * TILE // (4 * mean)
        error = (actual[:, part, :groups].int() - expected[:, part, :groups].int()).abs()
        assert error.max() <= 1 if groups else True
        differ += error.sum().item()
    # A sum that lies midway between two codes may be rounded to either.
    assert differ <= 0.02 * actual.numel()


def test_a_sum_of_parts_is_rounded_once() -> None:
    codes = torch.randint(MASS_CODES - 24, (8, 500), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    for parts in (1, 2, 4, 8):
        exact = weights(codes[:parts]).sum(0) / ONE
        assert torch.equal(add(codes[:parts]), encode(exact))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    chunk = make_chunk(SPARSE, device)
    means, lse = make_means(chunk), make_lse(chunk)
    with pytest.raises(ValueError, match="room for"):
        ops.key_means(chunk.kv, chunk.seq_len, means[:, :9], Kernel.TRITON)
    with pytest.raises(ValueError, match="halves"):
        ops.row_normalisers(chunk, means, lse[:, :2], Kernel.TRITON)
    with pytest.raises(ValueError, match="groups"):
        ops.group_masses(chunk, means, lse, make_masses(chunk, 2)[:, :, :8], Kernel.TRITON)
    with pytest.raises(ValueError, match="parts"):
        ops.group_masses(chunk, means, make_lse(chunk, 32), make_masses(chunk, 2), Kernel.TRITON)
    with pytest.raises(ValueError, match="parts"):
        ops.select_groups(
            make_masses(chunk, 2), chunk, lse, 32, 0, 0, 0, True, make_index(chunk, 9), Kernel.TRITON
        )  # fmt: skip
    with pytest.raises(ValueError, match="got 8"):
        ops.row_normalisers(chunk, means, make_lse(chunk, 8), Kernel.TRITON)
    few = make_masses(chunk, 1)
    with pytest.raises(ValueError, match="hold 2 heads"):
        ops.group_masses(chunk, means, lse, few, Kernel.TRITON)
    with pytest.raises(ValueError, match="hold 2 heads"):
        ops.select_groups(few, chunk, lse, 16, 0, 0, 0, True, make_index(chunk, 9), Kernel.TRITON)
