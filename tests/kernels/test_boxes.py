# SPDX-License-Identifier: Apache-2.0
"""Coarse scores first: which boxes are scored finely, each kernel against its plain-torch twin."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from minference_vllm import reference
from minference_vllm.boxes import BOX, GROUPS_PER_BOX, LISTS, Boxes
from minference_vllm.chunk import Chunk
from minference_vllm.index import GROUPS_PER_TILE, TileIndex
from minference_vllm.kernels import triton
from minference_vllm.methods.base import MAX_TOKENS
from minference_vllm.methods.block import Block, BlockSettings
from minference_vllm.ops import Kernel
from minference_vllm.scratch import ScratchShape, num_bytes
from tests.kernels.blocks import (
    BF16,
    engines,
    kept_by_half,
    make_boxes,
    make_coarse,
    make_lse,
    make_masses,
    make_means,
    parts_of,
    score_dtypes,
)  # fmt: skip
from tests.kernels.cases import Case, make_chunk

UNTOUCHED = 99
CASES = [
    Case("a tile a block", num_rows=140, context_len=2000, num_qo_heads=8, num_kv_heads=2, dtype=BF16),
    Case("group of seven", num_rows=130, context_len=1500, num_qo_heads=7, num_kv_heads=1, head_dim=128, dtype=BF16),
    Case("several tiles a block", num_rows=300, context_len=1100, num_qo_heads=2, num_kv_heads=2),
    Case("no context", num_rows=900, context_len=0, num_qo_heads=1, num_kv_heads=1),
    Case("second half only", num_rows=40, context_len=1220, page_size=48),
    Case("1 row", num_rows=1, context_len=1400, num_kv_heads=1),
]
every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
SPARSE = CASES[0]


def random_codes(chunk: Chunk, at_once: int, rows_per_half: int, seed: int, largest: int = 230) -> torch.Tensor:
    """[heads, parts, boxes] uint8, most of them small."""
    generator = torch.Generator().manual_seed(seed)
    shape = (at_once, parts_of(chunk, rows_per_half) + 1, chunk.first_tile + chunk.num_tiles + 2)
    codes = torch.rand(shape, generator=generator).pow(0.3) * largest
    return codes.to(torch.uint8).to(chunk.q.device)


def share_of(chunk: Chunk, share: float) -> torch.Tensor:
    """[num_qo_heads] float32: about the same for all heads, and not quite."""
    return share + torch.arange(chunk.num_qo_heads, dtype=torch.float32, device=chunk.q.device) * 1e-3


def check_boxes(chunk: Chunk, rows_per_half: int, share: float, room: int, seed: int = 0, largest: int = 230) -> Boxes:
    codes = random_codes(chunk, chunk.num_qo_heads, rows_per_half, seed, largest)
    return check_against_reference(
        triton.select_boxes, codes, chunk, share_of(chunk, share), rows_per_half, (1, 2), room
    )


def check_against_reference(
    select_boxes: Callable[..., None],
    codes: torch.Tensor,
    chunk: Chunk,
    share: torch.Tensor,
    rows_per_half: int,
    forced: tuple[int, int],
    room: int,
) -> Boxes:
    """Asserts that a kernel keeps the reference's boxes, and returns these. Takes the arguments of ops.select_boxes."""
    results = []
    for select in (reference.select_boxes, select_boxes):
        boxes, masses = make_boxes(chunk, rows_per_half, room), make_masses(chunk, chunk.num_qo_heads, rows_per_half)
        select(codes, chunk, share, rows_per_half, *forced, boxes, masses)
        results.append((boxes, masses))
    (expected, of_expected), (actual, of_actual) = results
    assert torch.equal(actual.counts, expected.counts)
    for number, count in zip(actual.numbers.flatten(0, 1), expected.counts.flatten().tolist(), strict=True):
        number[max(count, 0) :] = -7  # numbers past the count mean nothing
    assert torch.equal(actual.numbers, expected.numbers)
    assert torch.equal(of_actual, of_expected)
    return expected


@every_case
def test_boxes(case: Case, device: torch.device) -> None:
    check_boxes(make_chunk(case, device), 32, share=0.6, room=60)


@pytest.mark.parametrize("rows_per_half", [16, 64])
def test_boxes_of_more_or_fewer_rows(rows_per_half: int, device: torch.device) -> None:
    check_boxes(make_chunk(CASES[2], device), rows_per_half, share=0.6, room=60)


@pytest.mark.parametrize("share", [0.05, 0.84, 0.98, 1.0, 1.5])
def test_boxes_of_other_shares(share: float, device: torch.device) -> None:
    chunk = make_chunk(SPARSE, device)
    boxes = check_boxes(chunk, 32, share, room=60)
    if share > 1:
        num_lists = parts_of(chunk, 32) * chunk.group_size
        for block, counts in enumerate(boxes.counts[:-1, :-1].T):
            last_part = (min((block + 1) * LISTS, num_lists) - 1) // chunk.group_size
            assert (counts == chunk.first_tile + last_part // 4).all(), "every box before the block's last tile"


@pytest.mark.parametrize("room", [5, 7, 12])
@pytest.mark.parametrize("largest", [230, 3])
def test_boxes_where_there_is_no_room_for_all(room: int, largest: int, device: torch.device) -> None:
    """With few different codes many boxes are equal, and the first of them stay."""
    boxes = check_boxes(make_chunk(SPARSE, device), 32, 1.0, room, largest=largest)
    assert (boxes.counts[:-1, :-1] == room).any()


@every_case
def test_what_is_always_kept_is(case: Case, device: torch.device) -> None:
    chunk = make_chunk(case, device)
    codes = torch.zeros_like(random_codes(chunk, chunk.num_qo_heads, 32, 0))
    boxes, masses = make_boxes(chunk, 32, 60), make_masses(chunk, chunk.num_qo_heads, 32)
    triton.select_boxes(codes, chunk, share_of(chunk, 0.8), 32, 2, 1, boxes, masses)
    group_size = chunk.group_size
    for part in range(parts_of(chunk, 32)):
        tile = chunk.first_tile + part // 4
        for head in range(chunk.num_qo_heads):
            number, block = head // group_size, (part * group_size + head % group_size) // LISTS
            listed = boxes.numbers[number, block, : boxes.counts[number, block]].tolist()
            assert {0, 1, tile - 1} & set(range(tile)) <= set(listed)
            # The codes of all boxes that are not kept are overwritten.
            kept = torch.zeros(masses.shape[2] // GROUPS_PER_BOX, dtype=torch.bool)
            kept[listed] = True
            kept[tile:] = True
            assert torch.equal((masses[head, part] == UNTOUCHED).cpu(), kept.repeat_interleave(GROUPS_PER_BOX))


@score_dtypes
@pytest.mark.parametrize("seq_len", [31, 32, 500])
def test_coarse_means(seq_len: int, is_fp8: bool, device: torch.device) -> None:
    chunk = make_chunk(replace(SPARSE, context_len=seq_len - 1, num_rows=1), device)
    means = make_means(chunk, is_fp8=is_fp8)
    expected, actual = (make_coarse(chunk, means) for _ in range(2))
    actual.fill_(7)
    triton.coarse_means(means, seq_len, actual, 4, 32)
    torch.testing.assert_close(
        actual[:, : seq_len // 32].float(), expected[:, : seq_len // 32].float(), rtol=8e-3, atol=1e-3
    )
    assert (actual[:, seq_len // 32 :].float() == 7).all()
    from_keys = torch.full_like(expected, 0)
    reference.key_means(chunk.kv, seq_len, from_keys, mean=32)
    torch.testing.assert_close(
        expected[:, : seq_len // 32].float(), from_keys[:, : seq_len // 32].float(), rtol=0.1, atol=0.02
    )


@pytest.mark.parametrize(
    ("case", "is_fp8"),
    [(CASES[0], True), (CASES[1], False), (CASES[2], True)],
    ids=lambda of: getattr(of, "name", None),
)
def test_masses_in_boxes_are_those_of_all(case: Case, is_fp8: bool, device: torch.device) -> None:
    chunk = make_chunk(case, device)
    means, lse = make_means(chunk, is_fp8=is_fp8), make_lse(chunk, 32)
    reference.row_normalisers(chunk, means, lse)
    boxes = check_boxes(chunk, 32, share=0.6, room=60)
    for group_masses in (reference.group_masses, triton.group_masses):
        whole, some = (make_masses(chunk, chunk.num_qo_heads, 32) for _ in range(2))
        group_masses(chunk, means, lse, whole)
        group_masses(chunk, means, lse, some, boxes=boxes)
        for part in range(parts_of(chunk, 32)):
            groups = (chunk.first_tile + part // 4) * GROUPS_PER_TILE
            for head in range(chunk.num_qo_heads):
                block = (part * chunk.group_size + head % chunk.group_size) // LISTS
                count = boxes.counts[head // chunk.group_size, block]
                listed = torch.zeros(len(some[0, 0]) // GROUPS_PER_BOX, dtype=torch.bool)
                listed[boxes.numbers[head // chunk.group_size, block, :count].cpu().long()] = True
                inside = listed.repeat_interleave(GROUPS_PER_BOX)[:groups]
                row = some[head, part, :groups].cpu()
                assert torch.equal(row[inside], whole[head, part, :groups].cpu()[inside])
                assert (row[~inside] == UNTOUCHED).all()


@engines
def test_long_prompts_are_scored_coarsely_first(kernel: Kernel, device: torch.device) -> None:
    """If all that matters lies in two boxes, only these are scored finely, and the choice stays the same."""
    chunk = make_chunk(replace(SPARSE, num_rows=130, context_len=4000), device)
    direction = torch.ones(chunk.head_dim, device=device, dtype=BF16)
    chunk.q.copy_(direction + 0.1 * chunk.q)
    keys = torch.arange(4130, device=device)
    looked_at = (keys // BOX == 5) | (keys // BOX == 17) | (keys < 16)
    table, size = chunk.kv.block_table[chunk.kv.row].long(), chunk.kv.page_size
    chunk.kv.k[table[keys // size], :, keys % size] = torch.where(looked_at[:, None], 0.5, -0.5).to(BF16)[:, None]
    index, boxes = choose(chunk, BlockSettings(coarse_from=4130, long_from=0, share=0.7), kernel)
    whole, none = choose(chunk, BlockSettings(coarse_from=4131, long_from=0, share=0.7), kernel)
    assert none is None
    # A block of 16 lists is one tile here: four heads that share a KV head have four parts each in a tile.
    for block, before in enumerate((31, 32)):
        for number in range(chunk.kv.num_kv_heads):
            assert boxes.numbers[number, block, : boxes.counts[number, block]].tolist() == [0, 5, 17, before - 1]
    for head in range(chunk.num_qo_heads):
        for tile in range(2):
            assert torch.equal(kept_by_half(index, chunk, head, tile), kept_by_half(whole, chunk, head, tile))
            assert kept_by_half(index, chunk, head, tile)[:, 5 * GROUPS_PER_BOX : 6 * GROUPS_PER_BOX].all()


def choose(chunk: Chunk, settings: BlockSettings, kernel: Kernel) -> tuple[TileIndex, Boxes | None]:
    method, device = Block(settings, kernel), chunk.q.device
    shape = ScratchShape(chunk.num_qo_heads, chunk.kv.num_kv_heads, chunk.head_dim, chunk.q.dtype, 6000, 300)
    scratch = method.scratch(shape, device)
    index = method.choose(chunk, method.budgets(chunk.num_qo_heads, device), scratch)
    coarse = method.buffers(chunk, scratch).coarse
    return index, coarse and coarse.boxes


def test_what_is_always_kept_claims_no_room_for_boxes_that_no_prompt_has() -> None:
    shape = ScratchShape(4, 2, 64, BF16, 6000, 300)
    sizes = []
    for forced in (6000, MAX_TOKENS):
        method = Block(BlockSettings(coarse_from=0, sink_tokens=forced, local_tokens=forced), Kernel.REFERENCE)
        sizes.append(num_bytes(method.scratch(shape, torch.device("cpu"))))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("kernel", [Kernel.REFERENCE, Kernel.TRITON])
def test_more_may_be_kept_always_than_there_is(kernel: Kernel, device: torch.device) -> None:
    chunk = make_chunk(replace(SPARSE, num_rows=130, context_len=4000), device)
    _, boxes = choose(chunk, BlockSettings(coarse_from=0, sink_tokens=MAX_TOKENS, local_tokens=MAX_TOKENS), kernel)
    assert boxes is not None
    # A block of lists is one tile here, and all boxes before the tile are kept.
    for block, before in enumerate((31, 32)):
        assert (boxes.counts[: chunk.kv.num_kv_heads, block] == before).all()
