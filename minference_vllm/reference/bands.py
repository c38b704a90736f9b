# SPDX-License-Identifier: Apache-2.0
"""From kept diagonals to the band offsets that hold them."""

import torch

from minference_vllm.index import BANDS_PER_TILE


def band_lists(slash_below: torch.Tensor, num_bands: int, bands: torch.Tensor, bands_below: torch.Tensor) -> None:
    """List the bands that a tile needs to see every kept diagonal in full.

    Band `g` of a tile at row `t` holds the distances BAND * g - (BAND - 1) .. BAND * g + TILE - 1. It is kept if a kept
    diagonal lies in BAND * (g - 1) .. BAND * g + TILE - 1: one more than needed, so that `slash_below` suffices.

    Args:
        slash_below: [num_heads, >= num_bands + TILE / BAND + 1] int32, kept diagonals smaller than BAND * j.
        num_bands: largest offset that a tile of this chunk can use.
        bands: [num_heads, >= num_bands] int32, written: kept offsets, ascending, from 1 on.
        bands_below: [num_heads, >= num_bands + 2] int32, written: kept offsets smaller than g, g <= num_bands + 1.
    """
    upper = slash_below[:, BANDS_PER_TILE + 1 : BANDS_PER_TILE + 1 + num_bands]
    kept = upper > slash_below[:, :num_bands]
    bands_below[:, :2] = 0
    bands_below[:, 2 : num_bands + 2] = kept.cumsum(1)
    for head, row in enumerate(kept):
        offsets = row.nonzero().flatten() + 1
        bands[head, : len(offsets)] = offsets.to(torch.int32)
