# SPDX-License-Identifier: Apache-2.0
"""The types between choosing keys and attending to them. See docs/design.md for why bands are 16 keys fine."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

TILE = 128
"""Consecutive query rows, on absolute positions, that one program attends for."""

HALVES = 2

HALF = TILE // HALVES
"""Rows of a tile that share one set of bands."""

BAND = 16
"""Keys in a band: the grain of slashes. Pages are multiples of it, so a band never straddles two pages."""

BANDS_PER_TILE = TILE // BAND


class PagedKV(NamedTuple):
    """One request's keys and values as they lie in vLLM's cache.

    Attributes:
        k, v: [num_pages, num_kv_heads, page_size, head_dim], any strides but the last, which is 1.
        block_table: [num_reqs, max_pages], int32: page of the j-th page_size keys of each request.
        row: which row of block_table is this request's.
    """

    k: torch.Tensor
    v: torch.Tensor
    block_table: torch.Tensor
    row: int

    @property
    def page_size(self) -> int:
        return self.k.shape[2]


@dataclass(frozen=True, slots=True)
class SparseIndex:
    """Which keys each tile of one chunk attends to, per query head; every tensor on the device, sizes bounded up front.

    A row of half `h` (0, 1) of the tile that starts at absolute row `t` (a multiple of TILE) attends to
      * the tile's own keys, `t .. t + TILE - 1`, causally;
      * for each band offset `g >= 1` that its half sees with `BAND * g <= t`: the BAND keys from `t - BAND * g` on;
      * each column `c < t` of its head that no such band holds.
    Bands are shift-invariant, so the lists are per head and never per tile: 1M tokens cost megabytes.

    Band offsets come in three kinds: those that both halves see, only the first, only the second.

    Attributes:
        bands: [num_qo_heads, 3, max_bands] int32, ascending band offsets by kind; valid up to the head's count.
        bands_below: [num_qo_heads, 3, max_tiles + 1] int32: how many offsets of a kind tile m may use, the prefix up to
            m * BANDS_PER_TILE.
        band_halves: [num_qo_heads, max_bands + 1] uint8: bit h of [.., g] is set if half h sees offset g; [.., 0] is 0.
            Kernels read it in words of 4 bytes, so it starts on a multiple of 4 and is an allocation of its own.
        columns: [num_qo_heads, max_columns] int32, ascending; valid up to the head's count.
        columns_below: [num_qo_heads, max_tiles + 1] int32: how many columns are smaller than TILE * m.
    """

    bands: torch.Tensor
    bands_below: torch.Tensor
    band_halves: torch.Tensor
    columns: torch.Tensor
    columns_below: torch.Tensor
