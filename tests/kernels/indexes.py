# SPDX-License-Identifier: Apache-2.0
"""Indexes written by hand, and what they mean key by key."""

from typing import NamedTuple

import torch

from minference_vllm.index import BAND, BANDS_PER_TILE, HALF, TILE, SparseIndex
from tests.kernels.cases import Case


class Kept(NamedTuple):
    """What one head keeps: band offsets that both halves see, only the first, only the second; columns."""

    shared: list[int]
    first: list[int]
    second: list[int]
    columns: list[int]


NOTHING = Kept([], [], [], [])


def index_of(heads: list[Kept], case: Case, device: torch.device) -> SparseIndex:
    """An index of what each head keeps, with garbage where nothing is listed."""
    last_tile = (case.seq_len - 1) // TILE
    num_bands = last_tile * BANDS_PER_TILE

    def table(rows: list[list[int]], width: int) -> torch.Tensor:
        padded = [[*row, *[2**30] * (width - len(row))] for row in rows]
        return torch.tensor(padded, dtype=torch.int32, device=device)

    def below(rows: list[list[int]], grain: int) -> torch.Tensor:
        return table([[sum(entry < grain * m for entry in row) for m in range(last_tile + 1)] for row in rows], 0)

    bands = [entries for head in heads for entries in head[:3]]
    columns = [head.columns for head in heads]
    halves = [
        [3 * (g in head.shared) + (g in head.first) + 2 * (g in head.second) for g in range(num_bands + 1)]
        for head in heads
    ]
    return SparseIndex(
        table(bands, num_bands + 3).view(len(heads), 3, -1),
        # Offset m * BANDS_PER_TILE is the last that tile m may use.
        below([[g - 1 for g in row] for row in bands], BANDS_PER_TILE).view(len(heads), 3, -1),
        table(halves, 0).byte(),
        table(columns, 20),
        below(columns, TILE),
    )


def mask_of(heads: list[Kept], case: Case) -> torch.Tensor:
    """SparseIndex's definition, key by key: [num_qo_heads, num_rows, seq_len]."""
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
