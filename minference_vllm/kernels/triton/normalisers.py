# SPDX-License-Identifier: Apache-2.0
"""By what the scores of the rows that choose groups are normalised: one online softmax without values.

A program takes the sampled rows of some halves and heads under one KV head. A "list" here is all sampled rows of one
half under one head. Lists are counted half by half, and within a half head by head.
"""

import torch
import triton
import triton.language as tl

from minference_vllm.chunk import Chunk
from minference_vllm.index import GROUP, HALF, HALVES, TILE
from minference_vllm.kernels.triton.launch import LOG2_E
from minference_vllm.scratch import MEAN

PLAIN = ["num_rows", "context_len", "num_lists"]


@triton.jit
def _sampled_rows(half, row, num_rows, context_len, HALF: tl.constexpr, HALVES: tl.constexpr, STRIDE: tl.constexpr):
    """Absolute position of the row-th sampled row of a half, and whether the chunk has rows of that half."""
    position = half * HALF + (half // HALVES * 5 + 3) % STRIDE + STRIDE * row
    present = (half * HALF < context_len + num_rows) & (half * HALF + HALF > context_len)
    return tl.minimum(tl.maximum(position, context_len), context_len + num_rows - 1), present


@triton.jit
def _add_means(
    b_q, b_max, b_sum, means_ptr, o_j, begin, end, scale_log2,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online log-sum-exp step, base 2, over the means [BLOCK_N] numbered o_j; a row counts begin .. end - 1."""
    # [HEAD_DIM, BLOCK_N]; 2^22 means of 2^24 tokens, of 256 numbers each, still fit 32 bits
    p_k = means_ptr + o_j[None, :] * HEAD_DIM + tl.arange(0, HEAD_DIM)[:, None]
    if MASKED:
        b_k = tl.load(p_k, mask=(o_j < tl.max(end, 0))[None, :], other=0.0)
    else:
        b_k = tl.load(p_k)
    if UPCAST:
        b_k = b_k.to(tl.float32)
    # [BLOCK_M, BLOCK_N]
    b_s = tl.dot(b_q, b_k) * scale_log2
    if MASKED:
        b_s = tl.where((o_j[None, :] >= begin[:, None]) & (o_j[None, :] < end[:, None]), b_s, -1e38)
    # Never as low as what is masked out.
    new_max = tl.maximum(b_max, tl.max(b_s, 1))
    return new_max, b_sum * tl.exp2(b_max - new_max) + tl.sum(tl.exp2(b_s - new_max[:, None]), 1)


@triton.jit(do_not_specialize=PLAIN)
def _normalisers_kernel(
    q_ptr, means_ptr, lse_ptr, num_rows, context_len, num_lists, scale_log2,
    stride_qt, stride_qh, stride_mh, stride_lse,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, MEAN: tl.constexpr, LOG2_MEAN: tl.constexpr, BEFORE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LOG2_E: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    HALVES: tl.constexpr = TILE // HALF
    LISTS: tl.constexpr = BLOCK_M // ROWS
    i_l, i_kv = tl.program_id(0) * LISTS, tl.program_id(1)
    first_half = context_len // TILE * HALVES
    means_ptr += i_kv.to(tl.int64) * stride_mh

    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, HEAD_DIM)
    # [BLOCK_M]
    o_l = i_l + o_m // ROWS
    i_h = i_kv * GROUP_SIZE + o_l % GROUP_SIZE
    rows, present = _sampled_rows(
        first_half + o_l // GROUP_SIZE, o_m % ROWS, num_rows, context_len, HALF, HALVES, HALF // ROWS
    )
    # [BLOCK_M, HEAD_DIM]
    p_q = q_ptr + (rows - context_len).to(tl.int64)[:, None] * stride_qt + i_h[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    b_max = tl.full([BLOCK_M], -1e30, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)

    # [BLOCK_M], a row's means: of its own group those that are complete
    begin = tl.zeros([BLOCK_M], tl.int32)
    end = tl.minimum((rows // GROUP + 1) * GROUP, context_len + num_rows) // MEAN
    # All rows see the means before the first row's tile.
    unmasked = tl.min(rows, 0) // TILE * (TILE // MEAN) // BLOCK_N * BLOCK_N
    if BEFORE:
        for start in range(0, unmasked, BLOCK_N):
            b_max, b_sum = _add_means(
                b_q, b_max, b_sum, means_ptr, start + o_n, begin, end, scale_log2, HEAD_DIM, False, UPCAST
            )
    else:
        begin = rows // TILE * (TILE // MEAN)
    for start in range(unmasked, tl.max(end, 0), BLOCK_N):
        b_max, b_sum = _add_means(
            b_q, b_max, b_sum, means_ptr, start + o_n, begin, end, scale_log2, HEAD_DIM, True, UPCAST
        )

    lse = tl.where(present, (b_max + tl.log2(b_sum) + LOG2_MEAN) / LOG2_E, float("inf"))
    p_lse = lse_ptr + i_h.to(tl.int64) * stride_lse + o_l // GROUP_SIZE * ROWS + o_m % ROWS
    tl.store(p_lse, lse, mask=o_l < num_lists)


def row_normalisers(
    chunk: Chunk, means: torch.Tensor, row_lse: torch.Tensor, before: bool = True, mean: int = MEAN
) -> None:
    """See minference_vllm.reference.row_normalisers. Means follow each other without a gap, and so do rows."""
    q, rows_per_half = chunk.q, row_lse.shape[2]
    num_lists = chunk.num_tiles * HALVES * chunk.group_size
    block_m = 128 if chunk.head_dim <= 128 else 64
    _normalisers_kernel[(triton.cdiv(num_lists * rows_per_half, block_m), chunk.kv.num_kv_heads)](
        q, means, row_lse, chunk.num_rows, chunk.context_len, num_lists, chunk.scale * LOG2_E,
        q.stride(0), q.stride(1), means.stride(0), row_lse.stride(0),
        GROUP_SIZE=chunk.group_size, HEAD_DIM=chunk.head_dim, TILE=TILE, HALF=HALF, GROUP=GROUP,
        ROWS=rows_per_half, MEAN=mean, LOG2_MEAN=mean.bit_length() - 1, BEFORE=before,
        BLOCK_M=block_m, BLOCK_N=64, LOG2_E=LOG2_E,
        UPCAST=not q.is_cuda,  # the interpreter's dot is wrong for bf16
        num_warps=4, num_stages=2,
    )  # fmt: skip
