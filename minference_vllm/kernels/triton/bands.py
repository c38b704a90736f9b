# SPDX-License-Identifier: Apache-2.0
"""Lists the bands that contain the kept diagonals: one program for each head and kind, by a running prefix sum."""

import torch
import triton
import triton.language as tl

from minference_vllm.index import BAND, BANDS_PER_TILE, HALF
from minference_vllm.kernels.triton.launch import on_grid

BLOCK = 2048


@triton.jit(do_not_specialize=["num_bands"])
def _band_lists_kernel(
    slash_indptr_ptr, bands_ptr, bands_indptr_ptr, band_halves_ptr, num_bands,
    stride_slash, stride_bands, stride_bands_kind, stride_indptr, stride_indptr_kind, stride_halves,
    BANDS_PER_TILE: tl.constexpr, BANDS_PER_HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_h, i_k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slash_indptr_ptr += i_h * stride_slash
    bands_ptr += i_h * stride_bands + i_k * stride_bands_kind
    bands_indptr_ptr += i_h * stride_indptr + i_k * stride_indptr_kind
    band_halves_ptr += i_h * stride_halves
    # Kinds 0, 1, 2 are the offsets that both halves see, only the first, only the second.
    wanted = tl.where(i_k == 0, 3, i_k)
    kept_before = 0
    # Offset 0 is never kept: it is here only to write the first entries of bands_indptr and band_halves.
    for start in range(0, num_bands + 1, BLOCK):
        # [BLOCK]
        o_g = start + tl.arange(0, BLOCK)
        inside = o_g <= num_bands
        p_slash = slash_indptr_ptr + o_g
        real = inside & (o_g >= 1)
        first = tl.load(p_slash + BANDS_PER_HALF, mask=real, other=0) > tl.load(p_slash - 1, mask=real, other=0)
        upper = tl.load(p_slash + BANDS_PER_TILE, mask=real, other=0)
        second = upper > tl.load(p_slash + BANDS_PER_HALF - 1, mask=real, other=0)
        halves = first.to(tl.int32) + 2 * second.to(tl.int32)
        kept = (halves == wanted).to(tl.int32)
        through = kept_before + tl.cumsum(kept, 0)
        tl.store(bands_ptr + through - 1, o_g, mask=kept > 0)
        tl.store(bands_indptr_ptr + o_g // BANDS_PER_TILE, through, mask=inside & (o_g % BANDS_PER_TILE == 0))
        if i_k == 0:
            tl.store(band_halves_ptr + o_g, halves.to(tl.uint8), mask=inside)
        kept_before += tl.sum(kept, 0)


def band_lists(
    slash_indptr: torch.Tensor,
    num_bands: int,
    bands: torch.Tensor,
    bands_indptr: torch.Tensor,
    band_halves: torch.Tensor,
) -> None:
    """See minference_vllm.reference.band_lists."""
    on_grid(_band_lists_kernel, (bands.shape[0], bands.shape[1]))(
        slash_indptr, bands, bands_indptr, band_halves, num_bands,
        slash_indptr.stride(0), bands.stride(0), bands.stride(1), bands_indptr.stride(0), bands_indptr.stride(1),
        band_halves.stride(0),
        BANDS_PER_TILE=BANDS_PER_TILE, BANDS_PER_HALF=HALF // BAND, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
