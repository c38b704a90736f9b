# SPDX-License-Identifier: Apache-2.0
"""Selects, by the masses of boxes, those that each block of lists scores finely."""

import torch

from minference_vllm.boxes import GROUPS_PER_BOX, LISTS, Boxes
from minference_vllm.chunk import Chunk
from minference_vllm.index import HALVES
from minference_vllm.reference.codes import ONE
from minference_vllm.reference.groups import dropped_masses, least_kept, total_mass
from minference_vllm.reference.normalisers import LIMIT, PART

FIRST_COUNTED = 1
"""The first box whose mass is added to a list's mass: box 0 holds the first keys, which normalisers include already."""

PART_OF_DROPPED = 0.25
"""The share of the mass a head may drop that may be dropped as whole boxes."""

OF_PART = int(PART * ONE / LIMIT)
"""The mass of all that the normalisers of a part's rows include, in the units of codes.weights."""

FORCED = 256
"""Stands for the margin of a box that is always kept: above all differences of two codes."""


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
    """Keep, for each block, the boxes that any of its lists wants: all but the list's lightest.

    The lightest boxes of a list may hold up to PART_OF_DROPPED of the mass that its head may drop. A list's mass is
    that of what its rows' normalisers include, as in select_groups, and of the boxes before its tile. If a block's
    lists want more boxes than there is room for, the boxes with the largest margins stay, and of equal ones the first.
    A margin is how far a box's code lies above the threshold of the list that wants it most.

    Args:
        box_masses: [>= num_qo_heads, >= parts, >= boxes before the last tile] uint8, see group_masses.
        chunk: whose masses these are.
        share: [num_qo_heads] float32, the share of mass that each head keeps.
        rows_per_half: rows of a half, PART to a part.
        sink_boxes, local_boxes: how many first boxes, at least one, and boxes before the tile are always kept.
        boxes: written; it has room for what is always kept.
        masses: [>= num_qo_heads, ..] uint8, see group_masses: for each part, the codes of groups in boxes before its
            tile that its block drops are set to 0.
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
            for head, part, of_list in zip(heads, parts, dropped, strict=True):
                masses[head, part, : len(box) * GROUPS_PER_BOX].unflatten(0, (-1, GROUPS_PER_BOX))[of_list] = 0


def margins(codes: torch.Tensor, seen: torch.Tensor, free: torch.Tensor, drops: torch.Tensor) -> torch.Tensor:
    """By how far each box lies above the threshold of the list that wants it most, [num_boxes] int32.

    Args:
        codes: [LISTS or fewer, num_boxes] uint8.
        seen: [.., num_boxes] bool, boxes before each list's tile.
        free: [.., num_boxes] bool, the boxes among them that are not always kept.
        drops: [..] float64, how much of its mass each list may drop.
    """
    cuts = [
        threshold(of_list[is_seen], is_free[is_seen], of_head)
        for of_list, is_seen, is_free, of_head in zip(codes, seen, free, drops, strict=True)
    ]
    margin = codes.int() - torch.tensor(cuts, dtype=torch.int32, device=codes.device)[:, None]
    return margin.where(free, torch.where(seen, FORCED, -FORCED)).amax(0)


def threshold(codes: torch.Tensor, free: torch.Tensor, drops: torch.Tensor) -> int:
    """The smallest code with which a list keeps a box: the dropped ones hold no more than the share `drops`."""
    allowed = (drops * total_mass(codes, OF_PART, FIRST_COUNTED)).long()
    return least_kept(dropped_masses(codes, free) <= allowed)


def keep_most(margin: torch.Tensor, room: int) -> torch.Tensor:
    """[num_boxes] bool, the boxes that stay: the `room` largest margins from 0 on, of equal ones the first."""
    kept = margin >= 0
    if kept.sum() > room:
        order = margin.sort(descending=True, stable=True).indices
        kept = torch.zeros_like(kept)
        kept[order[:room]] = True
    return kept
