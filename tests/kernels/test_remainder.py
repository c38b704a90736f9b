# SPDX-License-Identifier: Apache-2.0
"""Attention to the keys that a tile drops, through summaries of boxes: the kernels against their plain-torch twins, and
the twins against a softmax that has the summaries as keys.
"""

from dataclasses import replace

import pytest
import torch

from minference_vllm import ops, reference
from minference_vllm.attention import prefill
from minference_vllm.boxes import BOX
from minference_vllm.chunk import Chunk, PagedKV
from minference_vllm.index import GROUP, TILE, TileIndex
from minference_vllm.methods.block import Block, BlockSettings
from minference_vllm.ops import Kernel
from minference_vllm.reference.dense import dense
from minference_vllm.reference.pages import gather
from minference_vllm.remainder import MAX_SUMMARIES, SPREAD, Summaries, keys_per_box
from minference_vllm.scratch import AttendBuffers
from tests.kernels.cases import FP8_CASES, SINK_CASES, Case, make_chunk, make_state
from tests.kernels.checks import adds_fp8, assert_close, relative_error
from tests.kernels.indexes import EVERY, KeptGroups, tile_index_of, tile_mask_of, tiles_in_turn

CASES = [
    Case("chunk after context", num_rows=150, context_len=512),
    Case("inside a tile", num_rows=40, context_len=340, num_qo_heads=3, num_kv_heads=3),
    Case("no box before it", num_rows=128, context_len=0),
    Case("1 row, HND", num_rows=1, context_len=400, num_kv_heads=1, layout="HND"),
    Case("group of seven, page 48", num_rows=60, context_len=333, num_qo_heads=7, num_kv_heads=1, page_size=48),
    Case("head_dim 128, bf16", num_rows=50, context_len=256, head_dim=128, dtype=torch.bfloat16),
    Case("head_dim 256", num_rows=50, context_len=200, head_dim=256, num_qo_heads=2, num_kv_heads=1, page_size=32),
    Case("float32", num_rows=70, context_len=300, dtype=torch.float32),
    *SINK_CASES,
    *FP8_CASES,
]
GPU_CASES = [
    Case("long", num_rows=3000, context_len=9001, head_dim=128, num_qo_heads=8, num_kv_heads=2, dtype=torch.bfloat16),
    Case("64K context", num_rows=700, context_len=65_536, num_qo_heads=7, num_kv_heads=1, dtype=torch.bfloat16),
]
every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name) for case in CASES]
    + [pytest.param(case, id=case.name, marks=pytest.mark.gpu) for case in GPU_CASES],
)
EXACT = Case("", num_rows=70, context_len=300, dtype=torch.float32)


def summaries_of(chunk: Chunk, keys: int, kernel: Kernel = Kernel.REFERENCE) -> Summaries:
    """Summaries of all boxes before the chunk's last row; NaN where there are none."""
    made = Summaries.allocate(chunk.kv.num_kv_heads, chunk.seq_len + 3 * BOX, chunk.head_dim, chunk.q.device)
    for summary in (made.keys, made.spreads, made.values):
        summary.fill_(torch.nan)
    ops.summarise(chunk.kv, chunk.seq_len // keys, keys, made, kernel)
    return made


def attended(chunk: Chunk, index: TileIndex) -> AttendBuffers:
    """Attention to the kept keys alone, by the reference: the chunk's `out`, and what else it writes."""
    buffers = AttendBuffers.allocate(chunk.num_qo_heads, chunk.num_rows + 5, chunk.q.device)
    buffers.lse.fill_(torch.nan)
    reference.attend(chunk, index, buffers)
    return buffers


def with_remainder(chunk: Chunk, index: TileIndex, keys: int, kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exps; the reference's summaries and attention to the kept keys, the kernel's remainder."""
    chunk = replace(chunk, out=torch.full_like(chunk.out, torch.nan))
    buffers = attended(chunk, index)
    ops.add_remainder(chunk, index, keys, summaries_of(chunk, keys), buffers, kernel)
    return chunk.out, buffers.lse


@every_case
@pytest.mark.parametrize("keys", [128, 256])
def test_summaries_are_the_twins(case: Case, keys: int, device: torch.device) -> None:
    chunk = make_chunk(case, device)
    expected, actual = (summaries_of(chunk, keys, kernel) for kernel in (Kernel.REFERENCE, Kernel.TRITON))
    for name in ("keys", "spreads", "values"):
        want, got = getattr(expected, name), getattr(actual, name)
        torch.testing.assert_close(got, want, rtol=4e-3, atol=4e-3, equal_nan=True)


def test_keys_with_a_common_offset_have_the_spread_of_what_differs(device: torch.device) -> None:
    chunk = make_chunk(EXACT, device)
    chunk.kv.k.add_(500)
    expected, actual = (summaries_of(chunk, BOX, kernel) for kernel in (Kernel.REFERENCE, Kernel.TRITON))
    torch.testing.assert_close(actual.spreads, expected.spreads, rtol=4e-3, atol=4e-3, equal_nan=True)
    assert 0.5 < actual.spreads[:, : chunk.seq_len // BOX].mean() < 1.5


@every_case
@pytest.mark.parametrize("keys", [128, 256])
def test_the_remainder_is_the_twins(case: Case, keys: int, device: torch.device) -> None:
    chunk, index = make_chunk(case, device), tile_index_of(tiles_in_turn(case.num_rows + keys), case, device)
    out, lse = with_remainder(chunk, index, keys, Kernel.REFERENCE)
    got, got_lse = with_remainder(chunk, index, keys, Kernel.TRITON)
    assert_close(got, out, adds_fp8(chunk))
    torch.testing.assert_close(got_lse, lse, rtol=2e-3, atol=2e-3, equal_nan=True)


def summarised_softmax(chunk: Chunk, kept: torch.Tensor, keys: int, summaries: Summaries) -> torch.Tensor:
    """Attention in float64 over the keys of a mask, [num_qo_heads, num_rows, seq_len], and over the rest of each box
    before a row's tile as one key, whose exponential counts as often as the box has dropped keys.
    """
    k, v = (x.double().repeat_interleave(chunk.group_size, 0) for x in gather(chunk.kv, chunk.seq_len))
    q = chunk.q.double().transpose(0, 1) * chunk.scale
    scores = (q @ k.transpose(1, 2)).masked_fill(~kept, -torch.inf)
    boxes = chunk.seq_len // keys
    mean, spread, value = (
        x[:, :boxes].double().repeat_interleave(chunk.group_size, 0)
        for x in (summaries.keys, summaries.spreads, summaries.values)
    )
    tile = (chunk.context_len + torch.arange(chunk.num_rows)) // TILE * TILE
    is_before = (torch.arange(boxes) + 1) * keys <= tile[:, None]
    dropped = (~kept[:, :, : boxes * keys]).unflatten(2, (boxes, keys)).sum(-1) * is_before
    of_boxes = q @ mean.transpose(1, 2) + SPREAD / 2 * q.square() @ spread.transpose(1, 2) + dropped.log()
    return (torch.cat([scores, of_boxes], -1).softmax(-1) @ torch.cat([v, value], 1)).transpose(0, 1)


@pytest.mark.parametrize("keys", [128, 256])
@pytest.mark.parametrize("context_len", [300, 512, 700])
def test_dropped_keys_take_part_as_often_as_they_are_and_with_their_boxes_means(keys: int, context_len: int) -> None:
    case, tiles = replace(EXACT, context_len=context_len), tiles_in_turn(context_len)
    chunk = make_chunk(case, torch.device("cpu"))
    out, _ = with_remainder(chunk, tile_index_of(tiles, case, chunk.q.device), keys, Kernel.REFERENCE)
    expected = summarised_softmax(chunk, tile_mask_of(tiles, case), keys, summaries_of(chunk, keys))
    torch.testing.assert_close(out, expected.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel", [Kernel.REFERENCE, Kernel.TRITON])
def test_boxes_of_equal_keys_are_attended_to_exactly(kernel: Kernel, device: torch.device) -> None:
    case = replace(EXACT, context_len=5 * TILE, num_rows=TILE)
    chunk = make_chunk(case, device)
    k, v = (x.clone() for x in gather(chunk.kv, case.seq_len))
    for x in (k, v):
        boxes = x[:, : case.context_len].unflatten(1, (-1, BOX))
        boxes.copy_(boxes[:, :, :1].half().float().expand_as(boxes))
    equal = replace(chunk, kv=_paged(k, v, case.page_size))
    dense(equal.q, equal.kv, equal.context_len, equal.scale, equal.out)
    few = tile_index_of([KeptGroups([0, 7, 21], [3], [30, 31])], case, device)
    out, _ = with_remainder(equal, few, BOX, kernel)
    assert relative_error(out, equal.out) < 2e-3
    attended(equal, few)
    assert relative_error(equal.out, out) > 0.1


def _paged(k: torch.Tensor, v: torch.Tensor, page_size: int) -> PagedKV:
    pages = -(-k.shape[1] // page_size)
    room = torch.nn.functional.pad(torch.cat([k, v], -1), (0, 0, 0, pages * page_size - k.shape[1]))
    cache = room.unflatten(1, (pages, page_size)).transpose(0, 1).contiguous()
    table = torch.arange(pages, dtype=torch.int32, device=k.device)[None]
    return PagedKV(*cache.split(k.shape[-1], dim=-1), table, 0)


@pytest.mark.parametrize("kernel", [Kernel.REFERENCE, Kernel.TRITON])
def test_tiles_that_keep_all_groups_are_left_as_they_are(kernel: Kernel, device: torch.device) -> None:
    chunk = make_chunk(EXACT, device)
    index = tile_index_of([EVERY], EXACT, device)
    out, lse = with_remainder(chunk, index, BOX, kernel)
    buffers = attended(chunk, index)
    assert torch.equal(out, chunk.out) and torch.equal(lse.nan_to_num(), buffers.lse.nan_to_num())


@pytest.mark.parametrize("kernel", [Kernel.REFERENCE, Kernel.TRITON])
def test_block_is_closer_to_dense_attention_with_it(kernel: Kernel, device: torch.device) -> None:
    # Values that have something in common, as a model's have, and scores that are spread over all keys.
    case = replace(EXACT, num_rows=200, context_len=1100, num_qo_heads=2, num_kv_heads=1)
    chunk = make_chunk(case, device)
    chunk = replace(chunk, scale=chunk.scale / 4)
    chunk.kv.v.add_(torch.linspace(-2, 2, case.head_dim, device=device))
    expected, errors = torch.empty_like(chunk.out), []
    dense(chunk.q, chunk.kv, chunk.context_len, chunk.scale, expected)
    for approximate in (False, True):
        settings = BlockSettings(share=0.05, long_from=0, max_density=1.0, approximate_dropped=approximate)
        method = Block(settings, kernel)
        prefill(chunk, method, make_state(case, method, device))
        errors.append(relative_error(chunk.out, expected))
    assert errors[1] < 0.5 * errors[0]


def test_boxes_double_until_a_prompt_has_no_more_than_there_is_room_for() -> None:
    assert [keys_per_box(length) for length in (1, 65_536, 65_537, 131_072, 1_048_576)] == [128, 128, 256, 256, 2048]
    for length in (100, 65_536, 70_000, 1_000_000):
        keys, room = keys_per_box(length), Summaries.allocate(1, length, 64, torch.device("cpu")).keys.shape[1]
        assert keys % GROUP == 0 and length // keys <= room <= MAX_SUMMARIES


def test_more_boxes_than_there_is_room_for_are_refused() -> None:
    chunk = make_chunk(EXACT, torch.device("cpu"))
    with pytest.raises(ValueError, match="room for 1 boxes"):
        ops.summarise(chunk.kv, 2, BOX, Summaries.allocate(2, BOX, 64, chunk.q.device), Kernel.REFERENCE)
