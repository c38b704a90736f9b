# SPDX-License-Identifier: Apache-2.0
"""From the masses of boxes to those that each block of lists looks at more closely."""

import torch

from minference_vllm.boxes import GROUPS_PER_BOX, LISTS, Boxes
from minference_vllm.chunk import Chunk
from minference_vllm.index import HALVES
from minference_vllm.reference.codes import weights
from minference_vllm.reference.groups import threshold
from minference_vllm.reference.normalisers import PART

FIRST_COUNTED = 1
"""The first box whose mass counts: the one before holds the first keys, which rows' normalisers have seen."""

PART_OF_DROPPED = 0.25
"""Of the mass that a head may drop, what its boxes may."""

FORCED = 256
"""Above all differences of two codes."""


def select_boxes(
    box_masses: torch.Tensor,
    chunk: Chunk,
    share: torch.Tensor,
    rows_per_half: int,
    sink_boxes: int,
    local_boxes: int,
    boxes: Boxes,
    masses: torch.Tensor,
) -> None:
    """Of each list drop the lightest boxes, as many as PART_OF_DROPPED of what its head may drop; keep what any wants.

    A list's mass is what its rows' normalisers have seen, as for select_groups, and that of the boxes before its tile.
    If a block's lists want more boxes than there is room for, those stay that one of them wants most, by how far
    their code lies above the list's threshold; of equals, the first.

    Args:
        box_masses: [>= num_qo_heads, >= parts, >= boxes before the last tile] uint8, see group_masses.
        chunk: whose masses these are.
        share: [num_qo_heads] float32, the share of mass that each head keeps.
        rows_per_half: rows of a half, PART to a part.
        sink_boxes, local_boxes: how many first boxes, at least one, and boxes before the tile are always kept.
        boxes: written; it has room for what is always kept.
        masses: [>= num_qo_heads, ..] uint8, see group_masses: the codes of groups in boxes before a part's tile that
            its block drops are written: 0.
    """
    parts_per_tile = HALVES * rows_per_half // PART
    num_lists = chunk.num_tiles * parts_per_tile * chunk.group_size
    for number in range(chunk.kv.num_kv_heads):
        for block in range(-(-num_lists // LISTS)):
            lists = torch.arange(block * LISTS, min((block + 1) * LISTS, num_lists), device=masses.device)
            parts, heads = lists // chunk.group_size, number * chunk.group_size + lists % chunk.group_size
            before = chunk.first_tile + parts // parts_per_tile
            box = torch.arange(int(before[-1]), device=masses.device)
            codes = box_masses[heads, parts, : len(box)]
            seen = box < before[:, None]
            free = seen & (box >= sink_boxes) & (box < before[:, None] - local_boxes)
            drops = PART_OF_DROPPED * (1 - share[heads].double())
            kept = keep_most(margins(codes, seen, free, drops), boxes.numbers.shape[2])
            boxes.counts[number, block] = kept.sum()
            boxes.numbers[number, block, : kept.sum()] = kept.nonzero().flatten().int()
            dropped = seen & ~kept
            boxes.left_out[heads, parts] = weights(codes).where(dropped & (box >= FIRST_COUNTED), 0).sum(1)
            for head, part, of_list in zip(heads, parts, dropped, strict=True):
                masses[head, part, : len(box) * GROUPS_PER_BOX].unflatten(0, (-1, GROUPS_PER_BOX))[of_list] = 0


def margins(codes: torch.Tensor, seen: torch.Tensor, free: torch.Tensor, drops: torch.Tensor) -> torch.Tensor:
    """By how far each box lies above the threshold of the list that wants it most, [num_boxes] int32.

    Args:
        codes: [LISTS or fewer, num_boxes] uint8.
        seen: [.., num_boxes] bool, boxes before each list's tile.
        free: [.., num_boxes] bool, those of them that are not kept whatever their mass.
        drops: [..] float64, how much of its mass each list may drop.
    """
    cuts = [
        threshold(of_list[is_seen], is_free[is_seen], of_head, PART, FIRST_COUNTED)
        for of_list, is_seen, is_free, of_head in zip(codes, seen, free, drops, strict=True)
    ]
    margin = codes.int() - torch.tensor(cuts, dtype=torch.int32, device=codes.device)[:, None]
    return margin.where(free, torch.where(seen, FORCED, -FORCED)).amax(0)


def keep_most(margin: torch.Tensor, room: int) -> torch.Tensor:
    """Which boxes of no negative margin stay, [num_boxes] bool: the `room` largest, of equals the first."""
    kept = margin >= 0
    if kept.sum() > room:
        order = margin.sort(descending=True, stable=True).indices
        kept = torch.zeros_like(kept)
        kept[order[:room]] = True
    return kept
