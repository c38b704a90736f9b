# SPDX-License-Identifier: Apache-2.0
"""The remainder of attention: boxes of keys are summarised, and rows attend to what their tiles drop of each box.

One program of the second kernel is one half of a tile under one query head. It reads the output that attending to the
kept keys has left, and writes it back with the remainder in it.
"""

import triton
import triton.language as tl

from minference_vllm.chunk import Chunk, PagedKV
from minference_vllm.index import EVERY_GROUP, GROUP, HALVES, TILE, TileIndex
from minference_vllm.kernels.triton.launch import (
    LOG2_E,
    SCALE_STRIDES,
    SCALES,
    kv_scales,
    kv_strides,
    on_grid,
    q_scales,
    scaled,
)
from minference_vllm.kernels.triton.operands import dot_operand
from minference_vllm.remainder import LARGEST, SPREAD, Summaries
from minference_vllm.scratch import AttendBuffers

NUMBERS_AT_ONCE = 4096
"""How many elements of keys a program of the first kernel reads at once."""

SEARCH_STEPS = 20
"""Halvings that find a place in a list of up to 2^20 groups."""

# Run-time integers whose value or alignment must not select another compiled variant, nor must the alignment of the
# pointers.
OF_BOXES = ["table_row", "stride_table", "keys_per_box", *SCALE_STRIDES[1:]]
OF_ROWS = ["num_rows", "context_len", "keys_per_box", "groups_per_box", SCALE_STRIDES[0]]


@triton.jit(do_not_specialize=OF_BOXES, do_not_specialize_on_alignment=SCALES[1:])
def _summarise_kernel(
    k_ptr, v_ptr, table_ptr, keys_ptr, spreads_ptr, values_ptr,
    k_scale_ptr, stride_k_scale, v_scale_ptr, stride_v_scale, table_row, keys_per_box,
    stride_kp, stride_kh, stride_kt, stride_table, stride_sh,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    i_kv, i_b = tl.program_id(0), tl.program_id(1)
    k_ptr += i_kv.to(tl.int64) * stride_kh
    v_ptr += i_kv.to(tl.int64) * stride_kh
    table_ptr += table_row.to(tl.int64) * stride_table
    o_n, o_d = tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    key_sum = tl.zeros([HEAD_DIM], tl.float32)
    square_sum = tl.zeros([HEAD_DIM], tl.float32)
    value_sum = tl.zeros([HEAD_DIM], tl.float32)
    # Squares are summed of keys less the box's first one: the variance is small against keys that all have an offset.
    page = tl.load(table_ptr + i_b * keys_per_box // PAGE_SIZE).to(tl.int64)
    # [HEAD_DIM]
    offset = tl.load(k_ptr + page * stride_kp + (i_b * keys_per_box % PAGE_SIZE) * stride_kt + o_d).to(tl.float32)
    for start in range(0, keys_per_box, BLOCK):
        # [BLOCK]
        keys = i_b * keys_per_box + start + o_n
        pages = tl.load(table_ptr + keys // PAGE_SIZE).to(tl.int64)
        # [BLOCK, HEAD_DIM]
        o_slot = (pages * stride_kp + (keys % PAGE_SIZE) * stride_kt)[:, None] + o_d[None, :]
        b_k = tl.load(k_ptr + o_slot).to(tl.float32) - offset[None, :]
        key_sum += tl.sum(b_k, 0)
        square_sum += tl.sum(b_k * b_k, 0)
        value_sum += tl.sum(tl.load(v_ptr + o_slot).to(tl.float32), 0)
    mean = key_sum / keys_per_box
    spread = tl.maximum(square_sum / keys_per_box - mean * mean, 0.0)
    k_scale = scaled(1.0, k_scale_ptr, stride_k_scale, i_kv)
    b_keys = (mean + offset) * k_scale
    b_spreads = spread * k_scale * k_scale
    b_values = value_sum / keys_per_box * scaled(1.0, v_scale_ptr, stride_v_scale, i_kv)
    at = i_kv.to(tl.int64) * stride_sh + i_b * HEAD_DIM + o_d
    tl.store(keys_ptr + at, tl.minimum(tl.maximum(b_keys, -LARGEST), LARGEST).to(tl.float16))
    tl.store(spreads_ptr + at, tl.minimum(b_spreads, LARGEST).to(tl.float16))
    tl.store(values_ptr + at, tl.minimum(tl.maximum(b_values, -LARGEST), LARGEST).to(tl.float16))


@triton.jit
def _listed_before(list_ptr, count, groups, STEPS: tl.constexpr):
    """How many of the first `count` entries of an ascending list are smaller than each of `groups`."""
    low = tl.zeros_like(groups)
    high = low + count
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        is_open = low < high
        is_smaller = is_open & (tl.load(list_ptr + middle, mask=is_open, other=0) < groups)
        low = tl.where(is_smaller, middle + 1, low)
        high = tl.where(is_open & (is_smaller == 0), middle, high)
    return low


@triton.jit
def _kept_groups(list_ptr, count, o_b, groups_per_box, STEPS: tl.constexpr):
    """How many groups of each box `o_b` an ascending list holds."""
    begin = _listed_before(list_ptr, count, o_b * groups_per_box, STEPS)
    return _listed_before(list_ptr, count, (o_b + 1) * groups_per_box, STEPS) - begin


@triton.jit(do_not_specialize=OF_ROWS, do_not_specialize_on_alignment=[SCALES[0], "sinks_ptr"])
def _add_remainder_kernel(
    q_ptr, out_ptr, lse_ptr, groups_ptr, counts_ptr, keys_ptr, spreads_ptr, values_ptr,
    q_scale_ptr, stride_q_scale, sinks_ptr, num_rows, context_len, keys_per_box, groups_per_box, scale,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_lse, stride_groups, stride_groups_tile, stride_counts, stride_sh,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr,
    EVERY_GROUP: tl.constexpr, SPREAD: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, LOG2_E: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = TILE // 2
    i_h, i_half = tl.program_id(0), tl.program_id(1)
    i_t, half, i_kv = i_half // 2, i_half % 2, i_h // GROUP_SIZE
    counts_ptr += i_h.to(tl.int64) * stride_counts + i_t * 3
    num_shared = tl.load(counts_ptr)
    start_m = (context_len // TILE + i_t) * TILE
    num_boxes = start_m // keys_per_box
    if (num_shared != EVERY_GROUP) & (num_boxes > 0):
        groups_ptr += i_h.to(tl.int64) * stride_groups + i_t.to(tl.int64) * stride_groups_tile
        num_first = tl.load(counts_ptr + 1)
        num_own = tl.where(half == 0, num_first, tl.load(counts_ptr + 2))
        own_ptr = groups_ptr + num_shared + tl.where(half == 0, 0, num_first)
        o_m = start_m + half * HALF + tl.arange(0, HALF)
        o_d, o_n = tl.arange(0, HEAD_DIM), tl.arange(0, BLOCK)
        in_chunk = (o_m >= context_len) & (o_m < context_len + num_rows)
        rows = (o_m - context_len).to(tl.int64)
        # [HALF, HEAD_DIM]
        b_q = tl.load(
            q_ptr + i_h * stride_qh + rows[:, None] * stride_qt + o_d[None, :], mask=in_chunk[:, None], other=0.0
        )
        b_q = scaled(b_q.to(tl.float32), q_scale_ptr, stride_q_scale, i_kv) * scale
        b_squares = dot_operand((b_q * b_q).to(tl.float16), tl.float16, UPCAST)
        b_q = dot_operand(b_q.to(tl.float16), tl.float16, UPCAST)
        # What attending to the kept keys has left: the output times the sum of exponentials, relative to its maximum.
        p_lse = lse_ptr + i_h.to(tl.int64) * stride_lse + rows
        row_max = tl.load(p_lse, mask=in_chunk, other=0.0) * LOG2_E
        row_sum = tl.full([HALF], 1.0, tl.float32)
        of_sink = tl.zeros([HALF], tl.float32)
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + i_h).to(tl.float32) * LOG2_E
            of_sink = tl.exp2(sink - row_max)
        p_out = out_ptr + i_h * stride_oh + rows[:, None] * stride_ot + o_d[None, :]
        acc = tl.load(p_out, mask=in_chunk[:, None], other=0.0).to(tl.float32) * (row_sum + of_sink)[:, None]
        at = i_kv.to(tl.int64) * stride_sh
        for start in range(0, num_boxes, BLOCK):
            # [BLOCK]
            o_b = start + o_n
            inside = o_b < num_boxes
            kept = _kept_groups(groups_ptr, num_shared, o_b, groups_per_box, STEPS)
            kept += _kept_groups(own_ptr, num_own, o_b, groups_per_box, STEPS)
            dropped = tl.where(inside, (groups_per_box - kept) * GROUP, 0)
            o_s = at + o_b[:, None] * HEAD_DIM + o_d[None, :]
            b_keys = dot_operand(tl.load(keys_ptr + o_s, mask=inside[:, None], other=0.0), tl.float16, UPCAST)
            b_spreads = dot_operand(tl.load(spreads_ptr + o_s, mask=inside[:, None], other=0.0), tl.float16, UPCAST)
            b_values = dot_operand(tl.load(values_ptr + o_s, mask=inside[:, None], other=0.0), tl.float16, UPCAST)
            # [HALF, BLOCK]
            b_s = tl.dot(b_q, tl.trans(b_keys)) + tl.dot(b_squares, tl.trans(b_spreads)) * (SPREAD / 2)
            often = tl.log2(tl.maximum(dropped, 1).to(tl.float32))
            b_s = tl.where((dropped > 0)[None, :], b_s * LOG2_E + often[None, :], float("-inf"))
            new_max = tl.maximum(row_max, tl.max(b_s, 1))
            b_p = tl.exp2(b_s - new_max[:, None])
            rescale = tl.exp2(row_max - new_max)
            row_sum = row_sum * rescale + tl.sum(b_p, 1)
            acc = tl.dot(b_p.to(b_values.dtype), b_values, acc * rescale[:, None])
            row_max = new_max
        total = row_sum
        if sinks_ptr is not None:
            total += tl.exp2(sink - row_max)
        tl.store(p_out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=in_chunk[:, None])
        tl.store(p_lse, (row_max + tl.log2(row_sum)) / LOG2_E, mask=in_chunk)


def summarise(kv: PagedKV, num_boxes: int, keys_per_box: int, summaries: Summaries) -> None:
    """See minference_vllm.reference.summarise."""
    if not num_boxes:
        return
    head_dim = summaries.keys.shape[2]
    on_grid(_summarise_kernel, (kv.num_kv_heads, num_boxes))(
        kv.k, kv.v, kv.block_table, summaries.keys, summaries.spreads, summaries.values,
        *kv_scales(kv), kv.row, keys_per_box, *kv_strides(kv), kv.block_table.stride(0), summaries.keys.stride(0),
        HEAD_DIM=head_dim, PAGE_SIZE=kv.page_size, BLOCK=NUMBERS_AT_ONCE // head_dim, LARGEST=LARGEST,
        num_warps=4,
    )  # fmt: skip


def add_remainder(
    chunk: Chunk, index: TileIndex, keys_per_box: int, summaries: Summaries, buffers: AttendBuffers
) -> None:
    """See minference_vllm.reference.add_remainder. A tile's groups and all counts of a head must be contiguous."""
    q, out = chunk.q, chunk.out
    on_grid(_add_remainder_kernel, (chunk.num_qo_heads, chunk.num_tiles * HALVES))(
        q, out, buffers.lse, index.groups, index.counts, summaries.keys, summaries.spreads, summaries.values,
        *q_scales(chunk), chunk.sinks,
        chunk.num_rows, chunk.context_len, keys_per_box, keys_per_box // GROUP, chunk.scale,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), buffers.lse.stride(0),
        index.groups.stride(0), index.groups.stride(1), index.counts.stride(0), summaries.keys.stride(0),
        GROUP_SIZE=chunk.group_size, HEAD_DIM=chunk.head_dim, TILE=TILE, GROUP=GROUP, EVERY_GROUP=EVERY_GROUP,
        SPREAD=SPREAD, BLOCK=64 if chunk.head_dim <= 128 else 32, STEPS=SEARCH_STEPS, LOG2_E=LOG2_E,
        UPCAST=not q.is_cuda,  # the interpreter's dot adds fp16 products in fp16
        num_warps=4,
    )  # fmt: skip
