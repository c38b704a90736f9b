# SPDX-License-Identifier: Apache-2.0
"""Lists, by the masses of groups, those that each tile keeps."""

import torch

from minference_vllm.chunk import Chunk
from minference_vllm.index import EVERY_GROUP, GROUP, GROUPS_PER_TILE, HALF, HALVES, TILE, TileIndex
from minference_vllm.reference.codes import ONE, add, weights
from minference_vllm.reference.masses import SQUARED
from minference_vllm.reference.normalisers import LIMIT, NORMALISER_KEYS, PART
from minference_vllm.scratch import MASS_CODES

ROW = int(ONE * (1 - SQUARED) / LIMIT)
"""The mass of all that a row's normaliser includes, in the units of codes.weights: of weights that add up to 1 / LIMIT,
none of which counts squared."""


def threshold(codes: torch.Tensor, free: torch.Tensor, drops: torch.Tensor, num_rows: int, long_groups: int) -> int:
    """The smallest code with which a group is kept: see select_groups.

    Args:
        codes: [num_groups] uint8.
        free: [num_groups] bool, groups that may be dropped; the others are kept whatever their mass.
        drops: float64 scalar, the share of the attention that the head may drop. Below 0 no group is dropped.
        num_rows: rows whose masses were added.
        long_groups: see select_groups.
    """
    total = total_mass(codes, num_rows * ROW, NORMALISER_KEYS // GROUP).double()
    dropped = dropped_masses(codes, free).double()
    compared = max(len(codes), long_groups)
    heaviness = weights(torch.arange(MASS_CODES, device=codes.device)).double() * compared
    # In this order: kernels multiply in the same, so that they round to the same numbers.
    limit = drops * drops * drops * total * total * total * len(codes)
    return least_kept(dropped * dropped * heaviness * compared <= limit)


def total_mass(codes: torch.Tensor, of_rows: int, first_counted: int) -> torch.Tensor:
    """The mass `of_rows`, which their normalisers include, and of the groups that these do not; int64 scalar."""
    return of_rows + weights(codes[first_counted:]).sum()


def dropped_masses(codes: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
    """[MASS_CODES] int64: by code, the mass of the free groups of this code and of smaller ones."""
    weight = torch.zeros(MASS_CODES, dtype=torch.int64, device=codes.device)
    return weight.index_add_(0, codes[free].long(), weights(codes[free])).cumsum(0)


def least_kept(may_be_dropped: torch.Tensor) -> int:
    """The smallest code that is kept. The largest always is: it stands for all larger masses too.

    Args:
        may_be_dropped: [MASS_CODES] bool, whether all groups of this code and of smaller ones may be dropped. True for
            no code after one for which it is false.
    """
    return min(int(may_be_dropped.sum()), MASS_CODES - 1)


def select_groups(
    masses: torch.Tensor,
    chunk: Chunk,
    share: torch.Tensor,
    rows_per_half: int,
    sink_groups: int,
    local_groups: int,
    long_groups: int,
    by_tile: bool,
    index: TileIndex,
) -> None:
    """For each half, or tile, drop the lightest groups before the tile, about as much as the head's share allows.

    A row's mass is ROW, for its own tile and the first NORMALISER_KEYS keys, plus the mass of the groups between them.
    Let n be the number of groups before the tile, m = max(n, long_groups), d the dropped part of the whole mass, and h
    the mass of the heaviest dropped group over that of a mean one of m, which is the whole mass by m. The lightest
    groups, equal codes together, are dropped while d² h <= (1 - share)³ n / m. The first groups of the request and
    those just before the tile are always kept, and their mass counts. A half of which the chunk has no row keeps what
    the other half keeps.

    Args:
        masses: [>= num_qo_heads, >= num_tiles * HALVES * parts of a half, >= groups before the last tile] uint8, see
            group_masses. With `by_tile` their values are undefined afterwards.
        chunk: whose masses these are.
        share: [num_qo_heads] float32, the share of each head; above 0. With 1 all that has mass is kept, above 1
            every group.
        rows_per_half: rows of a half whose masses are in `masses`, PART to a part.
        sink_groups, local_groups: how many first groups and groups before the tile are always kept.
        long_groups: tiles with fewer groups before them drop less: see above.
        by_tile: whether both halves' rows choose together, and both keep the same.
        index: lists and counts of the chunk's tiles are written. A tile whose halves together keep more groups than a
            list has room for keeps all: EVERY_GROUP.
    """
    parts = rows_per_half // PART
    for head in range(chunk.num_qo_heads):
        for tile in range(chunk.num_tiles):
            number = torch.arange((chunk.first_tile + tile) * GROUPS_PER_TILE, device=masses.device)
            free = (number >= sink_groups) & (number < len(number) - local_groups)
            first_parts = [(tile * HALVES + half) * parts for half in halves_that_choose(chunk, tile)]
            of_halves = [masses[head, first : first + parts, : len(number)] for first in first_parts]
            codes, num_rows = [add(of_half) for of_half in of_halves], rows_per_half
            if by_tile:
                codes, num_rows = [add(torch.cat(of_halves))] * 2, 2 * num_rows
            kept = []
            for of_half in codes:
                cut = threshold(of_half, free, 1 - share[head].double(), num_rows, long_groups)
                kept.append(~free | (of_half.int() >= cut))
            write_lists(kept[0], kept[1], index.groups[head, tile], index.counts[head, tile])


def halves_that_choose(chunk: Chunk, tile: int) -> tuple[int, int]:
    """Which half's rows choose for each half of a tile: its own or, if the chunk has none of these, the other's."""
    first_is_absent = tile == 0 and chunk.context_len % TILE >= HALF
    second_is_absent = tile == chunk.num_tiles - 1 and (chunk.seq_len - 1) % TILE < HALF
    return int(first_is_absent), int(not second_is_absent)


def write_lists(first: torch.Tensor, second: torch.Tensor, groups: torch.Tensor, counts: torch.Tensor) -> None:
    """List the groups that both halves keep, the first alone, the second alone.

    Args:
        first, second: [num_groups] bool, what each half keeps.
        groups: [max_groups] int32, written.
        counts: [3] int32, written.
    """
    kinds = [kept.nonzero().flatten() for kept in (first & second, first & ~second, second & ~first)]
    listed = torch.cat(kinds).to(torch.int32)
    if len(listed) > len(groups):
        counts.copy_(torch.tensor([EVERY_GROUP, 0, 0]))
        return
    groups[: len(listed)] = listed
    counts.copy_(torch.tensor([len(kept) for kept in kinds]))
