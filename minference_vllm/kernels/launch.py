# SPDX-License-Identifier: Apache-2.0
"""What kernels are launched with: strides, and the arguments that both attending kernels share."""

from typing import Any

import torch
import triton

from minference_vllm.index import BAND, TILE, PagedKV, SparseIndex

LOG2_E = 1.4426950408889634


def kv_strides(kv: PagedKV) -> tuple[int, int, int]:
    """Strides of page, KV head and token, the same for k and v.

    The stride of a dimension of size 1 is arbitrary (one KV head under tensor parallelism): 0 stands for it, lest a
    meaningless number, 1 above all, select another compiled variant.
    """
    if kv.k.stride() != kv.v.stride() or kv.k.stride(3) != 1:
        raise ValueError(
            f"k and v must share strides and end in 1, got {kv.k.stride()} and {kv.v.stride()}; "
            "pass the two halves of one cache tensor"
        )
    page, head, token, _ = kv.k.stride()
    return page, head if kv.k.shape[1] > 1 else 0, token


def attend_grid(q: torch.Tensor, context_len: int) -> tuple[int]:
    """One program a tile and query head."""
    num_rows, num_qo_heads, _ = q.shape
    return ((triton.cdiv(context_len + num_rows, TILE) - context_len // TILE) * num_qo_heads,)


def attend_arguments(
    q: torch.Tensor,
    kv: PagedKV,
    context_len: int,
    scale: float,
    index: SparseIndex,
    out: torch.Tensor,
    lse: torch.Tensor,
    kept_pairs: torch.Tensor,
) -> tuple[Any, ...]:
    """Run-time arguments of the attending kernels, in their order; see minference_vllm.reference.attend."""
    return (
        q, kv.k, kv.v, kv.block_table, out, lse, kept_pairs,
        index.bands, index.bands_below, index.band_halves, index.columns, index.columns_below,
        len(q), context_len, kv.row, scale * LOG2_E,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), *kv_strides(kv), kv.block_table.stride(0),
        lse.stride(0), index.bands.stride(0), index.bands.stride(1),
        index.bands_below.stride(0), index.bands_below.stride(1), index.band_halves.stride(0),
        index.columns.stride(0), index.columns_below.stride(0),
    )  # fmt: skip


def attend_constants(q: torch.Tensor, kv: PagedKV) -> dict[str, Any]:
    """Compile-time arguments of the attending kernels, those that both have."""
    return {
        "GROUP": q.shape[1] // kv.k.shape[1],
        "HEAD_DIM": q.shape[2],
        "PAGE_SIZE": kv.page_size,
        "TILE": TILE,
        "BAND": BAND,
        "LOG2_E": LOG2_E,
    }
