# SPDX-License-Identifier: Apache-2.0
"""Indexes written by hand or drawn at random, and what they mean key by key."""

import itertools
import random
from typing import NamedTuple

import torch

from minference_vllm.index import (
    BAND,
    BANDS_PER_TILE,
    EVERY_GROUP,
    GROUP,
    GROUPS_PER_TILE,
    HALF,
    TILE,
    BandIndex,
    TileIndex,
)
from tests.kernels.cases import Case

GARBAGE = 2**30  # in entries that list nothing: a group, a band or a column that no cache has


class Kept(NamedTuple):
    """What one head keeps: offsets of bands that both halves, only the first or only the second keeps, and columns."""

    shared: list[int]
    first: list[int]
    second: list[int]
    columns: list[int]


NOTHING = Kept([], [], [], [])


def index_of(heads: list[Kept], case: Case, device: torch.device) -> BandIndex:
    """An index of what each head keeps, with garbage where nothing is listed."""
    last_tile = (case.seq_len - 1) // TILE
    num_bands = last_tile * BANDS_PER_TILE

    def table(rows: list[list[int]], width: int) -> torch.Tensor:
        padded = [[*row, *[GARBAGE] * (width - len(row))] for row in rows]
        return torch.tensor(padded, dtype=torch.int32, device=device)

    def indptr(rows: list[list[int]], grain: int) -> torch.Tensor:
        return table([[sum(entry < grain * m for entry in row) for m in range(last_tile + 1)] for row in rows], 0)

    bands = [entries for head in heads for entries in head[:3]]
    columns = [head.columns for head in heads]
    halves = [
        [3 * (g in head.shared) + (g in head.first) + 2 * (g in head.second) for g in range(num_bands + 1)]
        for head in heads
    ]
    return BandIndex(
        table(bands, num_bands + 3).view(len(heads), 3, -1),
        # Offset m * BANDS_PER_TILE is the last that tile m may use.
        indptr([[g - 1 for g in row] for row in bands], BANDS_PER_TILE).view(len(heads), 3, -1),
        table(halves, 0).byte(),
        table(columns, 20),
        indptr(columns, TILE),
    )


def mask_of(heads: list[Kept], case: Case) -> torch.Tensor:
    """BandIndex's definition, key by key: [num_qo_heads, num_rows, seq_len]."""
    mask = torch.zeros(len(heads), case.num_rows, case.seq_len, dtype=torch.bool)
    for head, lists in enumerate(heads):
        for row in range(case.context_len, case.seq_len):
            tile = row // TILE * TILE
            kept = set(range(tile, row + 1)) | {column for column in lists.columns if column < tile}
            for offset in lists.shared + (lists.first if row < tile + HALF else lists.second):
                if BAND * offset <= tile:
                    kept |= set(range(tile - BAND * offset, tile - BAND * offset + BAND))
            mask[head, row - case.context_len, list(kept)] = True
    return mask


class KeptGroups(NamedTuple):
    """The groups that both halves of a tile keep, only the first, only the second, as far as they lie before the tile.
    If `every` is set, the tile keeps all groups before it, and its list holds garbage.
    """

    shared: list[int]
    first: list[int]
    second: list[int]
    every: bool = False

    def before(self, tile: int) -> tuple[list[int], list[int], list[int]]:
        first, second, third = ([g for g in groups if g < tile * GROUPS_PER_TILE] for groups in self[:3])
        return first, second, third


EVERY = KeptGroups([], [], [], every=True)

# For tiles with up to 80 groups before them.
NO_GROUP = KeptGroups([], [], [])
ALL_LISTED = KeptGroups(list(range(80)), [], [])
LONG = KeptGroups(list(range(0, 80, 2)), list(range(1, 20, 2)), list(range(21, 50, 2)))
SHARED_ONLY = KeptGroups([0, 1, *range(5, 80, 3)], [], [])
FIRST_ONLY = KeptGroups([], [0, 2, *range(7, 40)], [])
SECOND_ONLY = KeptGroups([], [], [1, 3, *range(8, 40)])
SHARED_AND_FIRST = KeptGroups(list(range(40)), list(range(40, 66)), [])
SHARED_AND_SECOND = KeptGroups(list(range(26, 66)), [], list(range(26)))
MANY_OF_THE_FIRST = KeptGroups([4, 9], list(range(10, 50)), [0, 1, 2, 5, 6])
MANY_OF_THE_SECOND = KeptGroups(list(range(30, 51)), [0, 3, 5, 6, 7], list(range(8, 29)))
TILES = [
    NO_GROUP, SHARED_AND_FIRST, EVERY, MANY_OF_THE_FIRST, SHARED_ONLY, SHARED_AND_SECOND, LONG, MANY_OF_THE_SECOND,
    ALL_LISTED, FIRST_ONLY, SECOND_ONLY,
]  # fmt: skip


def tiles_in_turn(seed: int) -> list[KeptGroups]:
    """All of TILES, in an order of this seed."""
    return random.Random(seed).sample(TILES, len(TILES))


def tiles_of(case: Case) -> range:
    """The tiles that hold rows of the chunk."""
    return range(case.context_len // TILE, (case.seq_len - 1) // TILE + 1)


def tile_index_of(tiles: list[KeptGroups], case: Case, device: torch.device) -> TileIndex:
    """An index in which the tiles of all heads, one head after the other, keep each of `tiles` in turn."""
    shape = (case.num_qo_heads, len(tiles_of(case)) + 1)
    counts = torch.full((*shape, 3), GARBAGE, dtype=torch.int32)
    groups = torch.full((*shape, tiles_of(case)[-1] * GROUPS_PER_TILE + 3), GARBAGE, dtype=torch.int32)
    for (head, i), kept in zip(_places(case), itertools.cycle(tiles), strict=False):
        if kept.every:
            counts[head, i] = torch.tensor([EVERY_GROUP, 0, 0])
            continue
        lists = kept.before(tiles_of(case)[i])
        counts[head, i] = torch.tensor([len(row) for row in lists])
        listed = [group for row in lists for group in row]
        groups[head, i, : len(listed)] = torch.tensor(listed, dtype=torch.int32)
    return TileIndex(groups.to(device), counts.to(device), long_tiles=case.num_rows % 3)


def tile_mask_of(tiles: list[KeptGroups], case: Case) -> torch.Tensor:
    """TileIndex's definition, key by key: [num_qo_heads, num_rows, seq_len]."""
    mask = torch.zeros(case.num_qo_heads, case.num_rows, case.seq_len, dtype=torch.bool)
    for (head, i), lists in zip(_places(case), itertools.cycle(tiles), strict=False):
        tile = tiles_of(case)[i]
        shared, first, second = lists.before(tile)
        for row in range(max(tile * TILE, case.context_len), min((tile + 1) * TILE, case.seq_len)):
            groups = shared + (first if row < tile * TILE + HALF else second)
            kept = set(range(tile * TILE, row + 1))
            for group in range(tile * GROUPS_PER_TILE) if lists.every else groups:
                kept |= set(range(GROUP * group, GROUP * group + GROUP))
            mask[head, row - case.context_len, list(kept)] = True
    return mask


def _places(case: Case) -> itertools.product:
    """(head, number of the tile within the chunk) of all tiles."""
    return itertools.product(range(case.num_qo_heads), range(len(tiles_of(case))))


def random_tile_index(case: Case, generator: torch.Generator, device: torch.device) -> TileIndex:
    """Each tile keeps groups for both halves, the first or the second with random probabilities; some keep all."""
    tiles = tiles_of(case)
    num_groups = tiles[-1] * GROUPS_PER_TILE
    shape = (case.num_qo_heads, len(tiles))
    before = torch.tensor(tiles)[:, None] * GROUPS_PER_TILE

    # [num_qo_heads, tiles, 3]: of each kind half of the tiles keep no group, the others from hardly any to nearly all.
    odds = torch.rand(*shape, 3, generator=generator) ** 2
    odds *= torch.randint(2, odds.shape, generator=generator)
    # [num_qo_heads, tiles, num_groups]: 0 for both halves, 1 for the first, 2 for the second, 3 for none.
    draws = torch.rand(*shape, num_groups, generator=generator)
    kinds = (draws[..., None] > (odds / odds.sum(-1, keepdim=True).clamp_min(1)).cumsum(-1)[:, :, None]).sum(-1)
    kinds = torch.where(torch.arange(num_groups) < before, kinds, 3)
    order = kinds.sort(dim=-1, stable=True).indices
    counts = torch.stack([(kinds == kind).sum(-1) for kind in range(3)], -1)
    is_listed = torch.arange(num_groups) < counts.sum(-1, keepdim=True)
    keeps_all = torch.rand(*shape, 1, generator=generator) < 0.1
    groups = torch.where(is_listed & ~keeps_all, order, GARBAGE)
    counts = torch.where(keeps_all, torch.tensor([EVERY_GROUP, 0, 0]), counts)
    long_tiles = int(torch.randint(len(tiles) + 2, (), generator=generator))
    return TileIndex(groups.int().to(device), counts.int().to(device), long_tiles)
