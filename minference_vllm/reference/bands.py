# SPDX-License-Identifier: Apache-2.0
"""Lists the bands that contain the kept diagonals."""

import torch

from minference_vllm.index import BAND, BANDS_PER_TILE, HALF

BANDS_PER_HALF = HALF // BAND


def band_lists(
    slash_indptr: torch.Tensor,
    num_bands: int,
    bands: torch.Tensor,
    bands_indptr: torch.Tensor,
    band_halves: torch.Tensor,
) -> None:
    """List the bands that each half of a tile needs to see every kept diagonal of its rows in full.

    Band `g` of the tile at row `t` holds the distances BAND * g - (BAND - 1) .. BAND * g + HALF - 1 of the first half's
    rows. That half sees it if a kept diagonal lies in BAND * (g - 1) .. BAND * g + HALF - 1: one distance more than
    needed, so that the counts at multiples of BAND in `slash_indptr` suffice. The second half's rows come HALF later,
    so it sees at offset g what the first half sees at g + HALF / BAND.

    Args:
        slash_indptr: [num_heads, >= num_bands + TILE / BAND + 1] int32, how many kept diagonals are smaller than BAND *
            j.
        num_bands: largest offset that a tile of this chunk can use, a multiple of TILE / BAND.
        bands: [num_heads, 3, >= num_bands] int32, written: offsets that both halves see, only the first, only the
            second; each ascending, from 1 on.
        bands_indptr: [num_heads, 3, num_bands / (TILE / BAND) + 1] int32, written: how many of them tile m may use.
        band_halves: [num_heads, >= num_bands + 1] uint8, written: bit h of [.., g] is set if half h sees offset g.
    """
    reach = num_bands + BANDS_PER_HALF
    seen = slash_indptr[:, BANDS_PER_HALF + 1 : BANDS_PER_HALF + 1 + reach] > slash_indptr[:, :reach]
    first, second = seen[:, :num_bands], seen[:, BANDS_PER_HALF:]
    band_halves[:, 0] = 0
    band_halves[:, 1 : num_bands + 1] = first.byte() + 2 * second.byte()
    bands_indptr[:, :, 0] = 0
    for kind, kept in enumerate((first & second, first & ~second, second & ~first)):
        bands_indptr[:, kind, 1:] = kept.cumsum(1)[:, BANDS_PER_TILE - 1 :: BANDS_PER_TILE]
        for head, row in enumerate(kept):
            offsets = row.nonzero().flatten() + 1
            bands[head, kind, : len(offsets)] = offsets.to(torch.int32)
