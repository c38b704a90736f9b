# SPDX-License-Identifier: Apache-2.0
"""Attention of a chunk's probe rows over all keys, summed by column and by diagonal: an exact two-pass softmax.

The first pass finds each row's log-sum-exp, over ranges of keys in parallel; the second recomputes the scores and adds
up the probabilities. Masses are integers (see MASS_UNIT), so atomics give the same sums in any order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from minference_vllm.chunk import Chunk
from minference_vllm.index import TILE
from minference_vllm.kernels.tape import act
from minference_vllm.kernels.triton.launch import (
    LOG2_E,
    SCALE_STRIDES,
    SCALES,
    kv_strides,
    on_grid,
    scaled_scores,
    score_scales,
)
from minference_vllm.kernels.triton.operands import dot_operand
from minference_vllm.kernels.triton.recall import _held_out_rows
from minference_vllm.scratch import HELD_OUT_ROWS, MASS_UNIT, PROBE_SPLITS, ProbeBuffers, RecallBuffers

LAST, SPREAD, HELD_OUT = range(3)
"""Which rows of the chunk: the last, as many spread evenly over it, or those that measure recall."""
_LAST, _SPREAD = tl.constexpr(LAST), tl.constexpr(SPREAD)

# Run-time integers whose value or alignment must not select another compiled variant.
PLAIN = ["num_rows", "context_len", "table_row", "stride_table", "blocks_each", *SCALE_STRIDES]


@triton.jit
def _probe_scores(
    q_ptr, k_ptr, table_ptr, i_h, start_n, num_rows, context_len, scale_log2,
    stride_qt, stride_qh, stride_kp, stride_kh, stride_kt,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    NUM_PROBES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scaled scores (base 2) of the probe rows for BLOCK_N keys from start_n on, and their distances row - key."""
    o_r = tl.arange(0, NUM_PROBES)
    o_d = tl.arange(0, HEAD_DIM)
    # [NUM_PROBES] rows of the chunk
    if ROWS == _LAST:
        rows = num_rows - NUM_PROBES + o_r
    elif ROWS == _SPREAD:
        rows = (o_r + 1) * num_rows // NUM_PROBES - 1
    else:
        rows = _held_out_rows(o_r, num_rows, context_len, NUM_PROBES, TILE)
    keys = start_n + tl.arange(0, BLOCK_N)
    in_cache = keys < context_len + num_rows
    p_q = q_ptr + rows.to(tl.int64)[:, None] * stride_qt + i_h * stride_qh + o_d[None, :]
    # [NUM_PROBES, HEAD_DIM]
    b_q = tl.load(p_q, mask=(rows >= 0)[:, None], other=0.0)
    pages = tl.load(table_ptr + keys // PAGE_SIZE, mask=in_cache, other=0).to(tl.int64)
    p_k = k_ptr + pages * stride_kp + (i_h // GROUP).to(tl.int64) * stride_kh + (keys % PAGE_SIZE) * stride_kt
    # [HEAD_DIM, BLOCK_N]
    b_k = tl.load(p_k[None, :] + o_d[:, None], mask=in_cache[None, :], other=0.0)
    b_q = dot_operand(b_q, b_q.dtype, UPCAST)
    b_k = dot_operand(b_k, b_q.dtype, UPCAST)
    # [NUM_PROBES, BLOCK_N]
    distance = (context_len + rows)[:, None] - keys[None, :]
    visible = (distance >= 0) & (rows >= 0)[:, None]
    return tl.dot(b_q, b_k) * scale_log2, distance, visible


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=SCALES)
def _probe_lse_kernel(
    q_ptr, k_ptr, table_ptr, q_scale_ptr, stride_q_scale, k_scale_ptr, stride_k_scale, max_ptr, sum_ptr,
    num_rows, context_len, table_row, blocks_each, scale_log2,
    stride_qt, stride_qh, stride_kp, stride_kh, stride_kt, stride_table,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    NUM_PROBES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_h, i_s = tl.program_id(0), tl.program_id(1)
    table_ptr += table_row.to(tl.int64) * stride_table
    scale_log2 = scaled_scores(scale_log2, q_scale_ptr, stride_q_scale, k_scale_ptr, stride_k_scale, i_h // GROUP)
    blocks = tl.cdiv(context_len + num_rows, BLOCK_N)
    b_max = tl.full([NUM_PROBES], -1e30, tl.float32)
    b_sum = tl.zeros([NUM_PROBES], tl.float32)
    for block in range(i_s * blocks_each, tl.minimum((i_s + 1) * blocks_each, blocks)):
        b_s, _, visible = _probe_scores(
            q_ptr, k_ptr, table_ptr, i_h, block * BLOCK_N, num_rows, context_len, scale_log2,
            stride_qt, stride_qh, stride_kp, stride_kh, stride_kt,
            GROUP, HEAD_DIM, PAGE_SIZE, NUM_PROBES, ROWS, TILE, BLOCK_N, UPCAST,
        )  # fmt: skip
        new_max = tl.maximum(b_max, tl.max(tl.where(visible, b_s, -1e30), 1))
        b_p = tl.where(visible, tl.exp2(b_s - new_max[:, None]), 0.0)
        b_sum = b_sum * tl.exp2(b_max - new_max) + tl.sum(b_p, 1)
        b_max = new_max
    o_out = (i_h * tl.num_programs(1) + i_s) * NUM_PROBES + tl.arange(0, NUM_PROBES)
    tl.store(max_ptr + o_out, b_max)
    tl.store(sum_ptr + o_out, b_sum)


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=SCALES)
def _probe_mass_kernel(
    q_ptr, k_ptr, table_ptr, q_scale_ptr, stride_q_scale, k_scale_ptr, stride_k_scale, max_ptr, sum_ptr,
    lse_ptr, vertical_ptr, slash_ptr,
    num_rows, context_len, table_row, blocks_each, scale_log2,
    stride_qt, stride_qh, stride_kp, stride_kh, stride_kt, stride_table, stride_lse, stride_mass,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    NUM_PROBES: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    ACCUMULATE: tl.constexpr, INVERSE_UNIT: tl.constexpr, LOG2_E: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    i_h, i_n = tl.program_id(0), tl.program_id(1)
    table_ptr += table_row.to(tl.int64) * stride_table
    scale_log2 = scaled_scores(scale_log2, q_scale_ptr, stride_q_scale, k_scale_ptr, stride_k_scale, i_h // GROUP)
    o_r = tl.arange(0, NUM_PROBES)
    o_s = tl.arange(0, SPLITS)
    ran = (o_s < tl.num_programs(1))[:, None]
    # [SPLITS, NUM_PROBES]
    o_part = (i_h * tl.num_programs(1) + o_s)[:, None] * NUM_PROBES + o_r[None, :]
    b_max = tl.load(max_ptr + o_part, mask=ran, other=-1e30)
    b_sum = tl.load(sum_ptr + o_part, mask=ran, other=0.0)
    row_max = tl.max(b_max, 0)
    # [NUM_PROBES], base 2; -inf for a row that the chunk does not have
    lse = row_max + tl.log2(tl.sum(b_sum * tl.exp2(b_max - row_max[None, :]), 0))
    if i_n == 0:
        tl.store(lse_ptr + i_h * stride_lse + o_r, lse / LOG2_E)
    seq_len = context_len + num_rows
    vertical_ptr += i_h.to(tl.int64) * stride_mass
    slash_ptr += i_h.to(tl.int64) * stride_mass
    for block in range(i_n * blocks_each, tl.minimum((i_n + 1) * blocks_each, tl.cdiv(seq_len, BLOCK_N))):
        b_s, distance, visible = _probe_scores(
            q_ptr, k_ptr, table_ptr, i_h, block * BLOCK_N, num_rows, context_len, scale_log2,
            stride_qt, stride_qh, stride_kp, stride_kh, stride_kt,
            GROUP, HEAD_DIM, PAGE_SIZE, NUM_PROBES, ROWS, TILE, BLOCK_N, UPCAST,
        )  # fmt: skip
        # [NUM_PROBES, BLOCK_N]
        b_mass = (tl.where(visible, tl.exp2(b_s - lse[:, None]), 0.0) * INVERSE_UNIT + 0.5).to(tl.int32)
        keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
        b_column = tl.sum(b_mass, 0)
        if ACCUMULATE:
            b_column += tl.load(vertical_ptr + keys, mask=keys < seq_len, other=0)
        tl.store(vertical_ptr + keys, b_column, mask=keys < seq_len)
        tl.atomic_add(slash_ptr + distance, b_mass, mask=visible & (b_mass > 0), sem="relaxed")


def probe(chunk: Chunk, num_last: int, num_spread: int, buffers: ProbeBuffers) -> None:
    """See minference_vllm.reference.probe. `num_last` and `num_spread` are powers of two from 16 on, or 0."""
    act(buffers.slash[:, : chunk.seq_len].zero_)
    if num_last:
        _probe_group(chunk, buffers, num_last, 0, LAST)
    if num_spread:
        _probe_group(chunk, buffers, num_spread, num_last, SPREAD)


def held_out_sums(chunk: Chunk, buffers: RecallBuffers) -> int:
    """Compute partial softmaxes of the held-out rows, see reference.recall, over ranges of keys; return how many."""
    launch = _Launch.of(chunk, HELD_OUT_ROWS, HELD_OUT)
    on_grid(_probe_lse_kernel, launch.grid)(
        *launch.reads, buffers.partial_max, buffers.partial_sum, *launch.plain, **launch.shape
    )
    return launch.grid[1]


def _probe_group(chunk: Chunk, buffers: ProbeBuffers, count: int, before: int, rows: int) -> None:
    """Add the masses of one group of probe rows; `before` rows came before it."""
    launch = _Launch.of(chunk, count, rows)
    partials = (buffers.partial_max, buffers.partial_sum)
    on_grid(_probe_lse_kernel, launch.grid)(*launch.reads, *partials, *launch.plain, **launch.shape)
    lse = buffers.lse[:, before:]
    on_grid(_probe_mass_kernel, launch.grid)(
        *launch.reads, *partials, lse, buffers.vertical, buffers.slash,
        *launch.plain, lse.stride(0), buffers.vertical.stride(0),
        **launch.shape | dict(num_warps=8), SPLITS=PROBE_SPLITS,
        ACCUMULATE=before > 0, INVERSE_UNIT=1.0 / MASS_UNIT, LOG2_E=LOG2_E,
    )  # fmt: skip


class _Launch(NamedTuple):
    """The launch arguments that both passes over one group of rows share."""

    grid: tuple[int, int]
    reads: tuple[Any, ...]
    plain: tuple[Any, ...]
    shape: dict[str, Any]

    @classmethod
    def of(cls, chunk: Chunk, count: int, rows: int) -> "_Launch":
        q, kv = chunk.q, chunk.kv
        block_n = 128 if chunk.head_dim <= 128 else 64
        blocks = triton.cdiv(chunk.seq_len, block_n)
        blocks_each = triton.cdiv(blocks, PROBE_SPLITS)
        sizes = (chunk.num_rows, chunk.context_len, kv.row, blocks_each, chunk.scale * LOG2_E)
        strides = (q.stride(0), q.stride(1), *kv_strides(kv), kv.block_table.stride(0))
        shape = dict(
            GROUP=chunk.group_size, HEAD_DIM=chunk.head_dim, PAGE_SIZE=kv.page_size,
            NUM_PROBES=count, ROWS=rows, TILE=TILE, BLOCK_N=block_n,
            UPCAST=not q.is_cuda,  # the interpreter's dot is wrong for bf16
            num_warps=4,
        )  # fmt: skip
        grid = (chunk.num_qo_heads, triton.cdiv(blocks, blocks_each))
        reads = (q, kv.k, kv.block_table, *score_scales(chunk))
        return cls(grid, reads, (*sizes, *strides), shape)
