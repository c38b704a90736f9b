# SPDX-License-Identifier: Apache-2.0
"""The normalisers of the rows that choose groups: log-sum-exps over a few means, as in a softmax without values.

A program takes the sampled rows of some lists of one tile under one KV head. A "list" here is all sampled rows of one
half under one head. A tile's lists are counted half by half, and within a half head by head.
"""

import math

import torch
import triton
import triton.language as tl

from minference_vllm.chunk import Chunk
from minference_vllm.index import GROUP, HALF, HALVES, TILE
from minference_vllm.kernels.triton.launch import LOG2_E, SCALE_STRIDES, SCALES, on_grid, scaled_scores, score_scales
from minference_vllm.kernels.triton.operands import dot_operand, query_operand
from minference_vllm.reference.normalisers import LIMIT, NORMALISER_KEYS
from minference_vllm.reference.operands import unit_of_products
from minference_vllm.scratch import MEAN

PLAIN = ["num_rows", "context_len", "group_size", "blocks_per_tile", *SCALE_STRIDES]


@triton.jit
def _sampled_rows(half, row, num_rows, context_len, HALF: tl.constexpr, HALVES: tl.constexpr, STRIDE: tl.constexpr):
    """Absolute position of the row-th sampled row of a half, and whether the chunk has rows of that half."""
    position = half * HALF + (half // HALVES * 5 + 3) % STRIDE + STRIDE * row
    present = (half * HALF < context_len + num_rows) & (half * HALF + HALF > context_len)
    return tl.minimum(tl.maximum(position, context_len), context_len + num_rows - 1), present


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=SCALES)
def _normalisers_kernel(
    q_ptr, means_ptr, lse_ptr, q_scale_ptr, stride_q_scale, k_scale_ptr, stride_k_scale,
    num_rows, context_len, group_size, blocks_per_tile, scale_log2,
    stride_qt, stride_qh, stride_mh, stride_lse,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, MEAN: tl.constexpr, LOG2_WEIGHT: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LOG2_E: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    HALVES: tl.constexpr = TILE // HALF
    OWN: tl.constexpr = TILE // MEAN
    i_b, i_kv = tl.program_id(0), tl.program_id(1)
    i_t = i_b // blocks_per_tile
    tile = context_len // TILE + i_t
    means_ptr += i_kv.to(tl.int64) * stride_mh
    scale_log2 = scaled_scores(scale_log2, q_scale_ptr, stride_q_scale, k_scale_ptr, stride_k_scale, i_kv)

    # [BLOCK_M], the list among the tile's and the row in it; the last block may reach past the last list
    o_m = i_b % blocks_per_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, HEAD_DIM)
    listed = o_m < HALVES * group_size * ROWS
    o_l = tl.minimum(o_m // ROWS, HALVES * group_size - 1)
    half = o_l // group_size
    i_h = i_kv * group_size + o_l % group_size
    rows, present = _sampled_rows(tile * HALVES + half, o_m % ROWS, num_rows, context_len, HALF, HALVES, HALF // ROWS)
    # [BLOCK_M, HEAD_DIM]
    p_q = q_ptr + (rows - context_len).to(tl.int64)[:, None] * stride_qt + i_h[:, None] * stride_qh + o_d[None, :]
    b_q = query_operand(tl.load(p_q), means_ptr, INTERPRETED)

    # [BLOCK_N], the tile's own means and then the first ones, which in the first tile are its own
    is_own = o_n < OWN
    o_j = tl.where(is_own, tile * OWN + o_n, o_n - OWN)
    counts = o_j < tl.where(is_own, (context_len + num_rows) // MEAN, tl.where(tile > 0, FIRST, 0))
    # [HEAD_DIM, BLOCK_N]; 2^22 means of 2^24 tokens, of 256 numbers each, still fit 32 bits
    b_k = tl.load(means_ptr + o_j[None, :] * HEAD_DIM + o_d[:, None], mask=counts[None, :], other=0.0)
    b_k = dot_operand(b_k, b_q.dtype, INTERPRETED)
    # [BLOCK_M, BLOCK_N]; a row sees the means of its own group, but no later ones
    seen = counts[None, :] & (o_j[None, :] * MEAN // GROUP <= rows[:, None] // GROUP)
    b_s = tl.where(seen, tl.dot(b_q, b_k) * scale_log2, float("-inf"))
    # Finite even if a row sees no mean: otherwise -inf would be subtracted from -inf.
    b_max = tl.maximum(tl.max(b_s, 1), -1e30)
    b_sum = tl.sum(tl.exp2(b_s - b_max[:, None]), 1)
    lse = tl.where(present, (b_max + tl.log2(b_sum) + LOG2_WEIGHT) / LOG2_E, float("inf"))
    p_lse = lse_ptr + i_h.to(tl.int64) * stride_lse + (i_t * HALVES + half) * ROWS + o_m % ROWS
    tl.store(p_lse, lse, mask=listed)


def row_normalisers(chunk: Chunk, means: torch.Tensor, row_lse: torch.Tensor, mean: int = MEAN) -> None:
    """See minference_vllm.reference.row_normalisers. Means follow each other without a gap, and so do rows."""
    q, rows_per_half = chunk.q, row_lse.shape[2]
    # The same even if a tile has fewer rows: the number of heads that choose in one turn must not select a variant.
    block_m = 128 if chunk.head_dim <= 128 else 64
    blocks_per_tile = triton.cdiv(HALVES * chunk.group_size * rows_per_half, block_m)
    on_grid(_normalisers_kernel, (chunk.num_tiles * blocks_per_tile, chunk.kv.num_kv_heads))(
        q, means, row_lse, *score_scales(chunk), chunk.num_rows, chunk.context_len, chunk.group_size, blocks_per_tile,
        chunk.scale * LOG2_E * unit_of_products(means),
        q.stride(0), q.stride(1), means.stride(0), row_lse.stride(0),
        HEAD_DIM=chunk.head_dim, TILE=TILE, HALF=HALF, GROUP=GROUP,
        ROWS=rows_per_half, MEAN=mean, LOG2_WEIGHT=math.log2(mean * LIMIT), FIRST=NORMALISER_KEYS // mean,
        BLOCK_M=block_m, BLOCK_N=triton.next_power_of_2((TILE + NORMALISER_KEYS) // mean), LOG2_E=LOG2_E,
        INTERPRETED=not q.is_cuda,
        num_warps=4, num_stages=1,
    )  # fmt: skip
