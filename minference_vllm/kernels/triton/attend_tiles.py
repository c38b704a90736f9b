# SPDX-License-Identifier: Apache-2.0
"""Attention of a chunk over the groups that a TileIndex keeps, read from the pages through the block table.

One program is one tile of one query head. It reads its kept keys BLOCK_N at a time: the tile's own keys under a causal
mask, then groups that both halves keep without a mask, then groups of one half, masked for the rows of the other half.
"""

import triton
import triton.language as tl

from minference_vllm.chunk import Chunk
from minference_vllm.index import EVERY_GROUP, GROUP, TILE, TileIndex
from minference_vllm.kernels.triton.attend import (
    ANYWHERE,
    PLAIN,
    _attend_to,
    _attend_to_own_tile,
    _launch_shape,
    _store_rows,
)
from minference_vllm.kernels.triton.launch import LOG2_E, all_scales, kv_strides, on_grid, scaled, scaled_scores
from minference_vllm.scratch import AttendBuffers


@triton.jit
def _place(num_tiles, long_tiles, GROUP_SIZE: tl.constexpr):
    """A program's tile of the chunk, and its head.

    Neighbouring programs are the query heads of one KV head, then neighbouring tiles: they share keys in L2. The
    longest tiles come first, so that the short ones fill the tail. Before all others come, under every head, those
    that may be far longer (TileIndex.long_tiles).
    """
    number = tl.program_id(0)
    ahead = tl.minimum(num_tiles, long_tiles)
    of_ahead = ahead * (tl.num_programs(0) // num_tiles)
    is_ahead = number < of_ahead
    number = tl.where(is_ahead, number, number - of_ahead)
    tiles = tl.maximum(tl.where(is_ahead, ahead, num_tiles - ahead), 1)
    tile = number // GROUP_SIZE % tiles + tl.where(is_ahead, 0, ahead)
    return num_tiles - 1 - tile, number // (GROUP_SIZE * tiles) * GROUP_SIZE + number % GROUP_SIZE


@triton.jit(do_not_specialize=[*PLAIN, "long_tiles"], do_not_specialize_on_alignment=ANYWHERE)
def _attend_tiles_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, out_ptr, lse_ptr, kept_ptr, groups_ptr, counts_ptr,
    q_scale_ptr, stride_q_scale, k_scale_ptr, stride_k_scale, v_scale_ptr, stride_v_scale, sinks_ptr,
    num_rows, context_len, table_row, scale_log2,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_kp, stride_kh, stride_kt, stride_table, stride_lse,
    stride_groups, stride_groups_tile, stride_counts, long_tiles,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr,
    GROUP: tl.constexpr, EVERY_GROUP: tl.constexpr, BLOCK_N: tl.constexpr, LOG2_E: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = TILE // 2
    GROUPS_PER_STEP: tl.constexpr = BLOCK_N // GROUP
    seq_len = context_len + num_rows
    num_tiles = tl.cdiv(seq_len, TILE) - context_len // TILE
    i_t, i_h = _place(num_tiles, long_tiles, GROUP_SIZE)
    i_kv = i_h // GROUP_SIZE
    start_m = (context_len // TILE + i_t) * TILE

    k_ptr += i_kv.to(tl.int64) * stride_kh
    v_ptr += i_kv.to(tl.int64) * stride_kh
    table_ptr += table_row.to(tl.int64) * stride_table
    scale_log2 = scaled_scores(scale_log2, q_scale_ptr, stride_q_scale, k_scale_ptr, stride_k_scale, i_kv)
    groups_ptr += i_h.to(tl.int64) * stride_groups + i_t.to(tl.int64) * stride_groups_tile
    counts_ptr += i_h.to(tl.int64) * stride_counts + i_t * 3

    o_m = start_m + tl.arange(0, TILE)
    o_n = tl.arange(0, BLOCK_N)
    in_chunk = (o_m >= context_len) & (o_m < seq_len)
    rows = (o_m - context_len).to(tl.int64)
    b_q, acc, row_max, row_sum = _attend_to_own_tile(
        q_ptr + i_h * stride_qh, rows, in_chunk, o_m, start_m, seq_len, scale_log2,
        k_ptr, v_ptr, table_ptr, stride_qt, stride_kp, stride_kt, HEAD_DIM, PAGE_SIZE, TILE, BLOCK_N, UPCAST,
    )  # fmt: skip

    # Groups that both halves keep, only the first, only the second.
    num_shared = tl.load(counts_ptr)
    num_first = tl.load(counts_ptr + 1)
    num_second = tl.load(counts_ptr + 2)
    # A tile that keeps every group has no list: the number of an entry is that of its group.
    num_listed = tl.where(num_shared == EVERY_GROUP, 0, num_shared + num_first + num_second)
    num_shared = tl.where(num_shared == EVERY_GROUP, start_m // GROUP, num_shared)
    unmasked_groups = num_shared // GROUPS_PER_STEP * GROUPS_PER_STEP
    for start in range(0, unmasked_groups, GROUPS_PER_STEP):
        entry = start + o_n // GROUP
        groups = tl.load(groups_ptr + entry, mask=entry < num_listed, other=0)
        groups = tl.where(entry < num_listed, groups, entry)
        keys = groups * GROUP + o_n % GROUP
        acc, row_max, row_sum = _attend_to(
            b_q, acc, row_max, row_sum, keys, keys >= 0, keys[None, :] >= 0, scale_log2,
            k_ptr, v_ptr, table_ptr, stride_kp, stride_kt, HEAD_DIM, PAGE_SIZE, False, UPCAST,
        )  # fmt: skip

    # Bit h is set for half h, of rows and of groups.
    # [TILE]
    row_half = tl.where(o_m - start_m < HALF, 1, 2)
    num_groups = num_shared + num_first + num_second
    for start in range(unmasked_groups, num_groups, GROUPS_PER_STEP):
        # [BLOCK_N]
        entry = start + o_n // GROUP
        only = tl.where(entry < num_shared + num_first, 1, tl.where(entry < num_groups, 2, 0))
        halves = tl.where(entry < num_shared, 3, only)
        groups = tl.load(groups_ptr + entry, mask=entry < num_listed, other=0)
        groups = tl.where(entry < num_listed, groups, entry)
        keys = groups * GROUP + o_n % GROUP
        acc, row_max, row_sum = _attend_to(
            b_q, acc, row_max, row_sum, keys, halves > 0, (row_half[:, None] & halves[None, :]) != 0, scale_log2,
            k_ptr, v_ptr, table_ptr, stride_kp, stride_kt, HEAD_DIM, PAGE_SIZE, True, UPCAST,
        )  # fmt: skip

    acc = scaled(acc, v_scale_ptr, stride_v_scale, i_kv)
    _store_rows(
        out_ptr + i_h * stride_oh, lse_ptr + i_h.to(tl.int64) * stride_lse, sinks_ptr, i_h,
        acc, row_max, row_sum, rows, in_chunk, stride_ot, HEAD_DIM, LOG2_E,
    )  # fmt: skip
    kept = (num_shared + tl.where(row_half == 1, num_first, num_second)) * GROUP + o_m - start_m + 1
    # 64-bit: 128 rows of 2^24 keys are 2^31 pairs.
    tl.atomic_add(kept_ptr, tl.sum(tl.where(in_chunk, kept, 0).to(tl.int64), 0), sem="relaxed")


def attend_tiles(chunk: Chunk, index: TileIndex, buffers: AttendBuffers) -> None:
    """See minference_vllm.reference.attend. A tile's groups and all counts of a head must be contiguous."""
    q, out, kv = chunk.q, chunk.out, chunk.kv
    block_n, num_warps, num_stages = _launch_shape(chunk.head_dim, q.device)
    on_grid(_attend_tiles_kernel, (chunk.num_tiles * chunk.num_qo_heads,))(
        q, kv.k, kv.v, kv.block_table, out, buffers.lse, buffers.kept_pairs, index.groups, index.counts,
        *all_scales(chunk), chunk.sinks,
        chunk.num_rows, chunk.context_len, kv.row, chunk.scale * LOG2_E,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), *kv_strides(kv), kv.block_table.stride(0),
        buffers.lse.stride(0), index.groups.stride(0), index.groups.stride(1), index.counts.stride(0),
        index.long_tiles,
        GROUP_SIZE=chunk.group_size, HEAD_DIM=chunk.head_dim, PAGE_SIZE=kv.page_size,
        TILE=TILE, GROUP=GROUP, EVERY_GROUP=EVERY_GROUP, BLOCK_N=block_n, LOG2_E=LOG2_E,
        UPCAST=not q.is_cuda,  # the interpreter's dot is wrong for bf16
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
