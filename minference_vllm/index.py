# SPDX-License-Identifier: Apache-2.0
"""The contract between choosing keys and attending to them. docs/design.md says why its grain is 16 keys."""

from dataclasses import dataclass

import torch

TILE = 128
"""Consecutive query rows of one head that one program handles. A tile starts at an absolute multiple of TILE."""

HALVES = 2

HALF = TILE // HALVES
"""Rows of a tile that share one set of bands."""

BAND = 16
"""Keys in a band: the grain of slashes. Pages are multiples of it, so a band never straddles two pages."""

BANDS_PER_TILE = TILE // BAND

GROUP = 16
"""Consecutive keys on absolute positions, from a multiple of GROUP on: the grain in which a tile's keys are chosen."""

GROUPS_PER_TILE = TILE // GROUP

EVERY_GROUP = -1
"""Stands in place of a number of groups: the tile keeps all groups before it, and its list is not read."""


@dataclass(frozen=True, slots=True)
class BandIndex:
    """Which keys each tile of one chunk attends to, per query head, shift-invariant: the same for every tile.

    A row of half `h` (0, 1) of the tile that starts at absolute row `t` (a multiple of TILE) attends to
      * the tile's own keys, `t .. t + TILE - 1`, causally;
      * for each band offset `g >= 1` that its half sees with `BAND * g <= t`: the BAND keys from `t - BAND * g` on;
      * each column `c < t` of its head that no such band holds.
    The lists are per head, not per tile, so that 1M tokens take only megabytes. All tensors are on the device, and
    their sizes are bounded up front.

    Band offsets come in three kinds: those that both halves see, only the first, only the second.

    Attributes:
        bands: [num_qo_heads, 3, max_bands] int32, ascending band offsets by kind; valid up to the head's count.
        bands_indptr: [num_qo_heads, 3, max_tiles + 1] int32: how many offsets of each kind tile m may use: those up to
            m * BANDS_PER_TILE, which are a prefix of the list.
        band_halves: [num_qo_heads, max_bands + 1] uint8: bit h of [.., g] is set if half h sees offset g; [.., 0] is 0.
            Kernels read it in words of 4 bytes, so it starts on a multiple of 4 and is an allocation of its own.
        columns: [num_qo_heads, max_columns] int32, ascending; valid up to the head's count.
        columns_indptr: [num_qo_heads, max_tiles + 1] int32: how many columns are smaller than TILE * m.
    """

    bands: torch.Tensor
    bands_indptr: torch.Tensor
    band_halves: torch.Tensor
    columns: torch.Tensor
    columns_indptr: torch.Tensor


@dataclass(frozen=True, slots=True)
class TileIndex:
    """Which keys each tile of one chunk attends to, per query head: groups on absolute positions, listed tile by tile.

    A row of half `h` (0, 1) of the chunk's i-th tile, which starts at absolute row `t` (a multiple of TILE), attends to
      * the tile's own keys, `t .. t + TILE - 1`, causally;
      * the keys GROUP * g .. GROUP * g + GROUP - 1 of each group `g` that its half keeps. All listed groups lie before
        the tile: GROUP * (g + 1) <= t.
    The list of a tile holds first the groups that both halves keep, then those of the first alone, then those of the
    second alone, each part ascending. All tensors are on the device, their sizes are bounded up front.

    Attributes:
        groups: [num_qo_heads, max_tiles, max_groups] int32; valid up to the tile's count.
        counts: [num_qo_heads, max_tiles, 3] int32: how many groups both halves keep, the first alone, the second alone;
            (EVERY_GROUP, 0, 0) if the tile keeps all groups before it.
        long_tiles: how many tiles at the chunk's end may keep far more than all others. Kernels begin with these, so
            that no program still works on one when all others have ended. It does not affect the result.
    """

    groups: torch.Tensor
    counts: torch.Tensor
    long_tiles: int = 0


@dataclass(frozen=True, slots=True)
class HeadIndex:
    """The query heads that attend to all keys. The outputs of the other heads are left as they are.

    Attributes:
        heads: [num_qo_heads] int32, in any order; valid up to num_heads.
        num_heads: [1] int32, on the device like the other tensors, so that the host never waits for it.
    """

    heads: torch.Tensor
    num_heads: torch.Tensor


SparseIndex = BandIndex | TileIndex
"""What a method chooses."""

AnyIndex = SparseIndex | HeadIndex
"""What attending kernels take."""
