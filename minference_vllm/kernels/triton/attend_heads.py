# SPDX-License-Identifier: Apache-2.0
"""Dense causal attention of a chunk for the heads that a HeadIndex lists, read from the pages through the block table.

One program is one tile of one listed head; programs for heads that are not listed end at once.
"""

import triton
import triton.language as tl

from minference_vllm.chunk import Chunk
from minference_vllm.index import TILE, HeadIndex
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


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=ANYWHERE)
def _attend_heads_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, out_ptr, lse_ptr, kept_ptr, heads_ptr, num_heads_ptr,
    q_scale_ptr, stride_q_scale, k_scale_ptr, stride_k_scale, v_scale_ptr, stride_v_scale, sinks_ptr,
    num_rows, context_len, table_row, scale_log2,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_kp, stride_kh, stride_kt, stride_table, stride_lse,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr,
    BLOCK_N: tl.constexpr, LOG2_E: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    seq_len = context_len + num_rows
    num_tiles = tl.cdiv(seq_len, TILE) - context_len // TILE
    i_n = tl.program_id(0) // num_tiles
    if i_n >= tl.load(num_heads_ptr):
        return
    i_h = tl.load(heads_ptr + i_n)
    # The longest tiles come first, so that the short ones fill the tail.
    start_m = (context_len // TILE + num_tiles - 1 - tl.program_id(0) % num_tiles) * TILE
    i_kv = (i_h // GROUP_SIZE).to(tl.int64)
    k_ptr += i_kv * stride_kh
    v_ptr += i_kv * stride_kh
    table_ptr += table_row.to(tl.int64) * stride_table
    scale_log2 = scaled_scores(scale_log2, q_scale_ptr, stride_q_scale, k_scale_ptr, stride_k_scale, i_kv)

    o_m = start_m + tl.arange(0, TILE)
    o_n = tl.arange(0, BLOCK_N)
    in_chunk = (o_m >= context_len) & (o_m < seq_len)
    rows = (o_m - context_len).to(tl.int64)
    b_q, acc, row_max, row_sum = _attend_to_own_tile(
        q_ptr + i_h * stride_qh, rows, in_chunk, o_m, start_m, seq_len, scale_log2,
        k_ptr, v_ptr, table_ptr, stride_qt, stride_kp, stride_kt, HEAD_DIM, PAGE_SIZE, TILE, BLOCK_N, UPCAST,
    )  # fmt: skip
    for start in range(0, start_m, BLOCK_N):
        keys = start + o_n
        acc, row_max, row_sum = _attend_to(
            b_q, acc, row_max, row_sum, keys, keys >= 0, keys[None, :] >= 0, scale_log2,
            k_ptr, v_ptr, table_ptr, stride_kp, stride_kt, HEAD_DIM, PAGE_SIZE, False, UPCAST,
        )  # fmt: skip
    acc = scaled(acc, v_scale_ptr, stride_v_scale, i_kv)
    _store_rows(
        out_ptr + i_h * stride_oh, lse_ptr + i_h.to(tl.int64) * stride_lse, sinks_ptr, i_h,
        acc, row_max, row_sum, rows, in_chunk, stride_ot, HEAD_DIM, LOG2_E,
    )  # fmt: skip
    tl.atomic_add(kept_ptr, tl.sum(tl.where(in_chunk, o_m + 1, 0).to(tl.int64), 0), sem="relaxed")


def attend_heads(chunk: Chunk, index: HeadIndex, buffers: AttendBuffers) -> None:
    """See minference_vllm.reference.attend."""
    q, out, kv = chunk.q, chunk.out, chunk.kv
    block_n, num_warps, num_stages = _launch_shape(chunk.head_dim, q.device)
    on_grid(_attend_heads_kernel, (chunk.num_tiles * chunk.num_qo_heads,))(
        q, kv.k, kv.v, kv.block_table, out, buffers.lse, buffers.kept_pairs, index.heads, index.num_heads,
        *all_scales(chunk), chunk.sinks,
        chunk.num_rows, chunk.context_len, kv.row, chunk.scale * LOG2_E,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), *kv_strides(kv), kv.block_table.stride(0),
        buffers.lse.stride(0),
        GROUP_SIZE=chunk.group_size, HEAD_DIM=chunk.head_dim, PAGE_SIZE=kv.page_size,
        TILE=TILE, BLOCK_N=block_n, LOG2_E=LOG2_E,
        UPCAST=not q.is_cuda,  # the interpreter's dot is wrong for bf16
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
