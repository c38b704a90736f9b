# SPDX-License-Identifier: Apache-2.0
"""How much attention each part of a half gives to each group before the tile, estimated from means of keys.

A "list" is a part of a half's sampled rows under one head: ROWS rows. Lists are counted part by part, and within a part
head by head. A program takes some lists under one KV head, BLOCK_M rows in all, and a range of means. Scores are
computed as a matrix of means by rows. Rows are ordered such that, by the layout of a tensor core's accumulator, each
thread holds all rows of its lists: sums over rows need no exchange between threads. Sums over a group's means come
after, on a sixteenth of the numbers.
"""

import torch
import triton
import triton.language as tl

from minference_vllm.boxes import GROUPS_PER_BOX, LISTS, MEANS_PER_GROUP, Boxes
from minference_vllm.chunk import Chunk
from minference_vllm.index import HALF, HALVES, TILE
from minference_vllm.kernels.triton.codes import encode
from minference_vllm.kernels.triton.launch import LOG2_E, SCALE_STRIDES, SCALES, on_grid, scaled_scores, score_scales
from minference_vllm.kernels.triton.normalisers import _sampled_rows
from minference_vllm.kernels.triton.operands import dot_operand, query_operand
from minference_vllm.reference.masses import CENTRE, OCTAVES, STEPS, UNIT, squared_for
from minference_vllm.reference.normalisers import PART
from minference_vllm.reference.operands import unit_of_products
from minference_vllm.scratch import MEAN

MEANS_EACH = 8192
"""Means that one program scores: enough to pay for loading its rows, few enough that programs fill the GPU."""

PLAIN = ["num_rows", "context_len", "num_lists", "group_size", "means_each", *SCALE_STRIDES]


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=SCALES)
def _masses_kernel(
    q_ptr, means_ptr, lse_ptr, masses_ptr, boxes_ptr, box_counts_ptr,
    q_scale_ptr, stride_q_scale, k_scale_ptr, stride_k_scale,
    num_rows, context_len, num_lists, group_size, means_each, scale_log2,
    stride_qt, stride_qh, stride_kh, stride_lse, stride_mh, stride_mt, stride_bs, stride_bb, stride_cs,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, ROWS_PER_HALF: tl.constexpr, MEAN: tl.constexpr, LOG2_MEAN: tl.constexpr, SQUARED: tl.constexpr,
    EACH: tl.constexpr, GROUPS_PER_BOX: tl.constexpr, BLOCK_LISTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LOG2_E: tl.constexpr, OCTAVES: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr, CENTRE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    HALVES: tl.constexpr = TILE // HALF
    PARTS: tl.constexpr = ROWS_PER_HALF // ROWS
    LISTS: tl.constexpr = BLOCK_M // ROWS
    GROUPS: tl.constexpr = BLOCK_N // EACH
    BOX_MEANS: tl.constexpr = GROUPS_PER_BOX * EACH
    # Neighbouring programs share the range of means.
    i_l, i_n, i_kv = tl.program_id(0) * LISTS, tl.program_id(1), tl.program_id(2)
    first_tile = context_len // TILE
    # The last list's tile has the most groups before it. Other lists get masses of groups in and past their tiles too,
    # which nobody reads.
    last_list = tl.minimum(i_l + LISTS, num_lists) - 1
    num_means = (first_tile + last_list // group_size // (HALVES * PARTS)) * (TILE // MEAN)
    means_ptr += i_kv.to(tl.int64) * stride_kh
    scale_log2 = scaled_scores(scale_log2, q_scale_ptr, stride_q_scale, k_scale_ptr, stride_k_scale, i_kv)

    # [BLOCK_M], the list and the row in it: a thread holds column pairs that are 8 apart
    o_m = tl.arange(0, BLOCK_M)
    o_l = i_l + o_m // 2 % LISTS
    o_r = o_m // (2 * LISTS) * 2 + o_m % 2
    part = o_l // group_size
    i_h = i_kv * group_size + o_l % group_size
    listed = o_l < num_lists
    rows, _present = _sampled_rows(
        first_tile * HALVES + part // PARTS, part % PARTS * ROWS + o_r, num_rows, context_len,
        HALF, HALVES, HALF // ROWS_PER_HALF,
    )  # fmt: skip
    o_d = tl.arange(0, HEAD_DIM)
    p_q = q_ptr + (rows - context_len).to(tl.int64)[:, None] * stride_qt + i_h[:, None] * stride_qh + o_d[None, :]
    # [BLOCK_M, HEAD_DIM]
    b_q = query_operand(tl.load(p_q), means_ptr, INTERPRETED)
    b_lse = tl.load(lse_ptr + i_h.to(tl.int64) * stride_lse + part * ROWS + o_r, mask=listed, other=float("inf"))
    b_lse = (b_lse * LOG2_E - LOG2_MEAN + CENTRE) / OCTAVES - 1
    b_qt = tl.trans(b_q)

    o_n = tl.arange(0, BLOCK_N)
    # [LISTS]
    o_out = i_l + tl.arange(0, LISTS)
    out_head = i_kv * group_size + o_out % group_size
    p_out = masses_ptr + out_head.to(tl.int64) * stride_mh + (o_out // group_size).to(tl.int64) * stride_mt
    end = num_means
    if boxes_ptr is not None:
        boxes_ptr += i_kv.to(tl.int64) * stride_bs + (i_l // BLOCK_LISTS).to(tl.int64) * stride_bb
        end = tl.load(box_counts_ptr + i_kv * stride_cs + i_l // BLOCK_LISTS) * BOX_MEANS
    for start in range(i_n * means_each, tl.minimum((i_n + 1) * means_each, end), BLOCK_N):
        # [BLOCK_N], [GROUPS]
        o_j = start + o_n
        o_g = start // EACH + tl.arange(0, GROUPS)
        if boxes_ptr is not None:
            # An entry past the end gets a number past all means, so that nothing is stored for it.
            box = tl.load(boxes_ptr + o_j // BOX_MEANS, mask=o_j < end, other=1 << 24)
            o_j = box * BOX_MEANS + o_j % BOX_MEANS
            box = tl.load(boxes_ptr + o_g // GROUPS_PER_BOX, mask=o_g * EACH < end, other=1 << 24)
            o_g = box * GROUPS_PER_BOX + o_g % GROUPS_PER_BOX
        # [BLOCK_N, HEAD_DIM]; 2^22 means of 2^24 tokens, of 256 numbers each, still fit 32 bits
        p_means = means_ptr + o_j[:, None] * HEAD_DIM + o_d[None, :]
        b_k = tl.load(p_means, mask=(o_j < num_means)[:, None], other=0.0)
        b_k = dot_operand(b_k, b_q.dtype, INTERPRETED)
        # [BLOCK_N, BLOCK_M]; clamped at 1, so no mean counts more than LIMIT of what its row's normaliser includes
        b_y = tl.clamp(tl.dot(b_k, b_qt) * (scale_log2 / OCTAVES) - b_lse[None, :], 0.0, 1.0)
        b_w = (b_y * (OCTAVES * STEPS) + 0.5).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) / UNIT
        b_p = b_w * (1 - SQUARED + SQUARED * b_w)
        # [BLOCK_N, LISTS]
        b_mass = tl.sum(tl.sum(tl.reshape(b_p, (BLOCK_N, ROWS // 2, LISTS, 2)), 3), 1)
        # [GROUPS, LISTS]
        b_mass = tl.sum(tl.reshape(b_mass, (GROUPS, EACH, LISTS)), 1)
        b_code = encode(b_mass).to(tl.uint8)
        inside = (o_g < num_means // EACH)[:, None] & (o_out < num_lists)[None, :]
        tl.store(p_out[None, :] + o_g[:, None], b_code, mask=inside)


def group_masses(
    chunk: Chunk,
    means: torch.Tensor,
    row_lse: torch.Tensor,
    masses: torch.Tensor,
    mean: int = MEAN,
    boxes: Boxes | None = None,
) -> None:
    """See minference_vllm.reference.group_masses. The last two dimensions of means and row_lse are contiguous."""
    q, rows_per_half = chunk.q, row_lse.shape[2]
    num_lists = chunk.num_tiles * HALVES * rows_per_half // PART * chunk.group_size
    num_means = (chunk.first_tile + chunk.num_tiles - 1) * TILE // mean
    if not num_means:
        return
    numbers, counts, strides = None, None, (0, 0, 0)
    if boxes is not None:
        numbers, counts = boxes.numbers, boxes.counts
        strides = (numbers.stride(0), numbers.stride(1), counts.stride(0))
        num_means = min(num_means, numbers.shape[2] * GROUPS_PER_BOX * MEANS_PER_GROUP)
    block_m = 128 if chunk.head_dim <= 128 else 64
    num_blocks = triton.cdiv(num_lists * PART, block_m)
    grid = (num_blocks, triton.cdiv(num_means, MEANS_EACH), chunk.kv.num_kv_heads)
    on_grid(_masses_kernel, grid)(
        q, means, row_lse, masses, numbers, counts, *score_scales(chunk),
        chunk.num_rows, chunk.context_len, num_lists, chunk.group_size, MEANS_EACH,
        chunk.scale * LOG2_E * unit_of_products(means),
        q.stride(0), q.stride(1), means.stride(0), row_lse.stride(0), masses.stride(0), masses.stride(1),
        *strides,
        HEAD_DIM=chunk.head_dim, TILE=TILE, HALF=HALF,
        ROWS=PART, ROWS_PER_HALF=rows_per_half, MEAN=mean, LOG2_MEAN=mean.bit_length() - 1, SQUARED=squared_for(mean),
        EACH=MEANS_PER_GROUP, GROUPS_PER_BOX=GROUPS_PER_BOX, BLOCK_LISTS=LISTS,
        BLOCK_M=block_m, BLOCK_N=64,
        LOG2_E=LOG2_E, OCTAVES=OCTAVES, STEPS=STEPS, UNIT=UNIT, CENTRE=CENTRE,
        INTERPRETED=not q.is_cuda,
        num_warps=4, num_stages=2,
    )  # fmt: skip
