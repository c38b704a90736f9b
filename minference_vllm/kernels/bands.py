# SPDX-License-Identifier: Apache-2.0
"""From kept diagonals to the band offsets that hold them: one program a head, a running prefix sum."""

import torch
import triton
import triton.language as tl

from minference_vllm.index import BANDS_PER_TILE

BLOCK = 2048


@triton.jit(do_not_specialize=["num_bands"])
def _band_lists_kernel(
    slash_below_ptr, bands_ptr, bands_below_ptr, num_bands, stride_slash, stride_bands, stride_below,
    BANDS_PER_TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0).to(tl.int64)
    slash_below_ptr += i_h * stride_slash
    bands_ptr += i_h * stride_bands
    bands_below_ptr += i_h * stride_below
    kept_before = 0
    # Offset g = num_bands + 1 is not kept: it only closes bands_below.
    for start in range(0, num_bands + 2, BLOCK):
        # [BLOCK]
        o_g = start + tl.arange(0, BLOCK)
        real = (o_g >= 1) & (o_g <= num_bands)
        upper = tl.load(slash_below_ptr + o_g + BANDS_PER_TILE, mask=real, other=0)
        lower = tl.load(slash_below_ptr + o_g - 1, mask=real, other=0)
        kept = (upper > lower).to(tl.int32)
        rank = kept_before + tl.cumsum(kept, 0) - kept
        tl.store(bands_below_ptr + o_g, rank, mask=o_g < num_bands + 2)
        tl.store(bands_ptr + rank, o_g, mask=kept > 0)
        kept_before += tl.sum(kept, 0)


def band_lists(slash_below: torch.Tensor, num_bands: int, bands: torch.Tensor, bands_below: torch.Tensor) -> None:
    """See minference_vllm.reference.band_lists."""
    _band_lists_kernel[(slash_below.shape[0],)](
        slash_below, bands, bands_below, num_bands,
        slash_below.stride(0), bands.stride(0), bands_below.stride(0),
        BANDS_PER_TILE=BANDS_PER_TILE, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
