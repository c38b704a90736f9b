# SPDX-License-Identifier: Apache-2.0
"""Recall of held-out rows, and the guard that acts on it: Triton against the reference, and what both promise."""

import math
from dataclasses import replace

import pytest
import torch

from minference_vllm import recall, reference
from minference_vllm.attention import Guard, LayerState, prefill
from minference_vllm.chunk import Chunk
from minference_vllm.index import TILE, HeadIndex
from minference_vllm.methods import Block
from minference_vllm.methods.block import BlockSettings
from minference_vllm.ops import Kernel
from minference_vllm.recall import LOST_ROWS, ROWS_PER_PART, Floors, parts_of
from minference_vllm.reference.dense import dense
from minference_vllm.reference.normalisers import sampled_rows
from minference_vllm.reference.recall import held_out_rows
from minference_vllm.scratch import HELD_OUT_ROWS, AttendBuffers, RecallBuffers, RecallTotals
from tests.kernels.cases import (
    CASES,
    GPU_CASES,
    IRREGULAR,
    Case,
    make_chunk,
    make_queries,
    make_rising_cache,
    make_state,
)
from tests.kernels.checks import assert_close
from tests.kernels.recalls import LAYER, attended, check_heads, check_recall, measure

gpu, hopper = pytest.mark.gpu, pytest.mark.hopper
on_gpu = pytest.mark.parametrize("case", [pytest.param(case, marks=gpu, id=case.name) for case in GPU_CASES])
everywhere = pytest.mark.parametrize(
    ("kernel", "case"),
    [
        pytest.param(kernel, case, marks=marks, id=f"{kernel}-{case.name}")
        for kernel, cases, marks in (
            (Kernel.TRITON, CASES, ()),
            (Kernel.TRITON, GPU_CASES, gpu),
            (Kernel.CUDA, GPU_CASES, (gpu, hopper)),
        )
        for case in cases
    ],
)


@everywhere
def test_recall_is_that_of_the_reference(kernel: Kernel, case: Case, device: torch.device) -> None:
    check_recall(kernel, case, device)


@everywhere
def test_listed_heads_attend_to_all_keys_and_others_are_left_alone(
    kernel: Kernel, case: Case, device: torch.device
) -> None:
    check_heads(kernel, case, device)


@pytest.mark.parametrize("rows_per_half", [16, 32])
@pytest.mark.parametrize("context_len", [0, 1, 2, 127, 640, 5003])
@pytest.mark.parametrize("num_rows", [512, 1000, 4096])
def test_held_out_rows_are_none_that_choose(num_rows: int, context_len: int, rows_per_half: int) -> None:
    case = Case("", num_rows=num_rows, context_len=context_len)
    chunk = make_chunk(replace(case, num_qo_heads=1, num_kv_heads=1), torch.device("cpu"))
    rows = held_out_rows(chunk)
    assert ((rows >= 0) & (rows < num_rows)).all()
    assert len(rows.unique()) == HELD_OUT_ROWS
    # One row at the middle of each of HELD_OUT_ROWS ranges, up to the three rows by which it may move.
    middle = (2 * torch.arange(HELD_OUT_ROWS) + 1) * num_rows // (2 * HELD_OUT_ROWS)
    assert ((rows - middle).abs() <= 3).all()
    # Sampled rows that lie before or past the chunk are replaced by its first or its last row.
    chosen = set(sampled_rows(chunk, rows_per_half).flatten().tolist()) - {context_len, context_len + num_rows - 1}
    assert chosen.isdisjoint((rows + context_len).tolist())


@pytest.mark.parametrize("num_rows", [1, 8192, 8193, 16384, 20_000, 32_768])
def test_a_long_chunk_has_equal_parts(num_rows: int) -> None:
    parts = parts_of(num_rows)
    assert [row for part in parts for row in part] == list(range(num_rows))
    assert all(0 < len(part) <= ROWS_PER_PART for part in parts) and len(parts) == -(-num_rows // ROWS_PER_PART)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("num_rows", [8192, 8200, 16_384, 24_000])
def test_two_tiles_of_rows_hold_as_many_held_out_rows_as_the_guard_needs(num_rows: int) -> None:
    chunk = make_chunk(replace(GUARDED, num_rows=num_rows, num_qo_heads=1, num_kv_heads=1), torch.device("cpu"))
    is_held_out = torch.zeros(num_rows, dtype=torch.int64)
    is_held_out[held_out_rows(chunk)] = 1
    # Held-out rows move by up to three.
    assert is_held_out.unfold(0, 2 * TILE + 6, 1).sum(1).min() >= LOST_ROWS


@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        pytest.param(Kernel.TRITON, IRREGULAR[1], id="triton"),
        pytest.param(Kernel.TRITON, GPU_CASES[-2], id="triton, long", marks=gpu),
        pytest.param(Kernel.CUDA, GPU_CASES[-2], id="cuda, long", marks=(gpu, hopper)),
    ],
)
def test_a_chunk_in_parts_is_measured_as_the_reference_does(
    kernel: Kernel, case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "ROWS_PER_PART", -(-case.num_rows // 3))
    check_recall(kernel, case, device)


# The guard

GUARDED = Case("guarded", num_rows=300, context_len=500, vertical_size=1, slash_size=16, num_qo_heads=4)


def guarded_prefill(kernel: Kernel, floor: float, chunk: Chunk, case: Case = GUARDED) -> tuple[Guard, AttendBuffers]:
    device = chunk.q.device
    guard = Guard(
        Floors(floor, 0.0),
        RecallBuffers.allocate(case.num_qo_heads, device),
        RecallTotals.allocate(1, case.num_qo_heads, device),
    )
    method = case.vertical_slash(kernel)
    state = replace(make_state(case, method, device), guard=guard)
    prefill(chunk, method, state)
    return guard, state.attend


def attended_to_all(chunk: Chunk) -> AttendBuffers:
    """The buffers after attending to all keys."""
    buffers = AttendBuffers.allocate(chunk.num_qo_heads, chunk.num_rows, chunk.q.device)
    heads = torch.arange(chunk.num_qo_heads, dtype=torch.int32, device=chunk.q.device)
    reference.attend(chunk, HeadIndex(heads, torch.tensor([len(heads)], device=heads.device)), buffers)
    return buffers


@pytest.mark.parametrize("kernel", [Kernel.REFERENCE, Kernel.TRITON])
def test_a_head_below_the_floor_gives_what_dense_attention_gives(kernel: Kernel, device: torch.device) -> None:
    chunk = make_chunk(GUARDED, device)
    # Rows of the last head look for far keys outside their tile; rows of the other heads attend to all keys equally.
    kv = make_rising_cache(GUARDED, device)
    q = make_queries(GUARDED, device)
    q[:, :3] *= 1e-3
    local, far = replace(chunk, q=q, kv=kv), [3]
    guard, attend = guarded_prefill(kernel, 0.35, local)
    # The other heads' rows keep 16 to 128 of 500 to 800 equal keys. That is below the floor, so they run dense too.
    listed = sorted(guard.buffers.heads[: int(guard.buffers.num_heads)].tolist())
    assert set(far) <= set(listed)
    expected = torch.empty_like(chunk.out)
    dense(q, kv, GUARDED.context_len, GUARDED.scale, expected)
    assert_close(local.out[:, listed], expected[:, listed])
    assert attend.lse[:, : chunk.num_rows].isfinite().all()


@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_no_floor_changes_nothing_and_the_highest_makes_all_dense(floor: float, device: torch.device) -> None:
    chunk, plain = make_chunk(GUARDED, device), make_chunk(GUARDED, device)
    method = GUARDED.vertical_slash(Kernel.TRITON)
    prefill(plain, method, make_state(GUARDED, method, device))
    guard, _ = guarded_prefill(Kernel.TRITON, floor, chunk)
    assert guard.totals.chunks.item() == 1
    if floor:
        dense(plain.q, plain.kv, GUARDED.context_len, GUARDED.scale, plain.out)
        assert guard.totals.redone.item() == GUARDED.num_qo_heads
        assert_close(chunk.out, plain.out)
    else:
        assert torch.equal(chunk.out, plain.out)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(("lost", "listed"), [([0], False), ([63], False), ([0, 63], True), ([62, 63], True)])
def test_lost_rows_of_all_parts_count_together(
    lost: list[int], listed: bool, parts: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall, "ROWS_PER_PART", 900 // parts)
    chunk = make_chunk(replace(GUARDED, num_rows=900), device)
    buffers = attended_to_all(chunk)
    rows = held_out_rows(chunk)
    assert len(rows) == parts * HELD_OUT_ROWS
    # Of the held-out rows, 0 is the chunk's first, and 62 and 63 are its last two, however many parts there are.
    buffers.lse[2, rows[[at if at == 0 else at - HELD_OUT_ROWS for at in lost]]] -= math.log(5)
    for kernel in (Kernel.REFERENCE, Kernel.TRITON):
        measured, totals = measure(kernel, chunk, buffers.lse, Floors(0.0, 0.25))
        assert measured.heads[: int(measured.num_heads)].tolist() == [2] * listed
        assert totals.chunks[LAYER] == 2


def test_rows_that_attend_to_all_keys_do_not_hide_what_the_others_miss(device: torch.device) -> None:
    chunk = replace(make_chunk(replace(GUARDED, context_len=640, num_rows=260), device), may_end_prompt=True)
    recalls = []
    for last in (0, 64):
        method = Block(
            BlockSettings(share=0.2, last_tokens=last, long_from=0, sink_tokens=16, local_tokens=16), Kernel.TRITON
        )
        rows = method.choosing_rows(chunk)
        assert rows == (260 if last == 0 else 128)
        guard = Guard(Floors(0.0, 0.0), RecallBuffers.allocate(4, device), RecallTotals.allocate(1, 4, device))
        shape = replace(GUARDED, context_len=640, num_rows=260).shape
        state = LayerState(
            0, method.budgets(4, device), method.scratch(shape, device), AttendBuffers.allocate(4, 260, device), guard
        )
        prefill(chunk, method, state)
        first = chunk.of_rows(0, 128)
        measured, _ = measure(Kernel.TRITON, first, state.attend.lse)
        recalls.append((guard.buffers.recall, measured.recall))
    assert torch.equal(*recalls[1])
    assert not torch.equal(*recalls[0])


def test_recall_that_is_no_number_is_below_every_floor_and_counts_as_nothing(device: torch.device) -> None:
    chunk, lse = attended(GUARDED, device)
    lse[2, :] = torch.nan
    for kernel in (Kernel.REFERENCE, Kernel.TRITON):
        buffers, totals = measure(kernel, chunk, lse)
        assert 2 in buffers.heads[: int(buffers.num_heads)].tolist()
        assert totals.sums[LAYER, 2] == totals.worst[LAYER, 2] == 0
        assert totals.flat.isfinite().all()


def test_without_a_floor_no_head_is_listed(device: torch.device) -> None:
    chunk, lse = attended(GUARDED, device)
    lse[2, :] = torch.nan
    for kernel in (Kernel.REFERENCE, Kernel.TRITON):
        buffers, totals = measure(kernel, chunk, lse, Floors(0.0, 0.0))
        assert buffers.num_heads.item() == totals.redone.sum() == 0


def test_all_keys_kept_is_a_recall_of_one(device: torch.device) -> None:
    chunk = make_chunk(GUARDED, device)
    buffers = attended_to_all(chunk)
    for kernel in (Kernel.REFERENCE, Kernel.TRITON):
        measured, totals = measure(kernel, chunk, buffers.lse)
        torch.testing.assert_close(measured.recall, torch.ones(4, device=device), rtol=0, atol=1e-3)
        assert totals.histogram[-1] == 8


@pytest.mark.parametrize(("lost", "listed"), [(0, False), (1, False), (2, True), (64, True)])
def test_two_lost_rows_are_enough(lost: int, listed: bool, device: torch.device) -> None:
    chunk = make_chunk(GUARDED, device)
    buffers = attended_to_all(chunk)
    # A recall of a fifth for some rows of one head, and of 1 for all others.
    buffers.lse[1, held_out_rows(chunk)[:lost]] -= math.log(5)
    for kernel in (Kernel.REFERENCE, Kernel.TRITON):
        measured, _ = measure(kernel, chunk, buffers.lse, Floors(0.0, 0.25))
        assert measured.heads[: int(measured.num_heads)].tolist() == [1] * listed


@pytest.mark.hopper
@on_gpu
def test_ten_runs_give_the_same_bits(case: Case, device: torch.device) -> None:
    chunk, lse = attended(case, device)
    first, *others = (measure(Kernel.CUDA, chunk, lse)[0].recall for _ in range(10))
    assert all(torch.equal(other, first) for other in others)
