# SPDX-License-Identifier: Apache-2.0
"""The types between choosing keys and attending to them. See docs/design.md for why bands are 16 keys fine."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

TILE = 128
"""Consecutive query rows, on absolute positions, that share one set of kept keys."""

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

    The tile that starts at absolute row `t` (a multiple of TILE) attends to
      * its own keys, `t .. t + TILE - 1`, causally;
      * for each band offset `g >= 1` of its head with `BAND * g <= t`: the BAND keys from `t - BAND * g` on;
      * each column `c < t` of its head that no such band holds.
    Bands are shift-invariant, so the lists are per head and never per tile: 1M tokens cost megabytes.

    Attributes:
        bands: [num_qo_heads, max_bands] int32, ascending band offsets; valid up to the head's count.
        bands_below: [num_qo_heads, max_bands + 2] int32: how many kept offsets are smaller than g. It gives the prefix
            that a tile may use (offsets up to t / BAND) and whether g is kept (bands_below[g + 1] > bands_below[g]).
        columns: [num_qo_heads, max_columns] int32, ascending; valid up to the head's count.
        columns_below: [num_qo_heads, max_tiles + 1] int32: how many columns are smaller than TILE * m.
    """

    bands: torch.Tensor
    bands_below: torch.Tensor
    columns: torch.Tensor
    columns_below: torch.Tensor
