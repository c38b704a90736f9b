# SPDX-License-Identifier: Apache-2.0
"""Each head's recall, from partial softmaxes of held-out rows over all keys: one program a head, one launch a part."""

import torch
import triton
import triton.language as tl

from minference_vllm.chunk import Chunk
from minference_vllm.index import TILE
from minference_vllm.kernels.tape import act
from minference_vllm.kernels.triton.launch import LOG2_E, on_grid
from minference_vllm.recall import LOST_ROWS, RECALL_EDGES, Floors
from minference_vllm.scratch import HELD_OUT_ROWS, RecallBuffers, RecallTotals


@triton.jit
def _held_out_rows(number, num_rows, context_len, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Rows of the chunk: see reference.recall.held_out_rows."""
    # With up to 2^24 rows the product stays below 2^31.
    positions = context_len + (2 * number + 1) * num_rows // (2 * ROWS)
    positions = positions // 4 * 4 + positions // TILE % 4
    return tl.minimum(tl.maximum(positions - context_len, 0), num_rows - 1)


@triton.jit
def _add_to_totals(histogram_ptr, layer_ptr, recall, EDGES: tl.constexpr, NUM_EDGES: tl.constexpr):
    """Count this program's head. For what a layer's row holds see RecallTotals."""
    i_h, num_qo_heads = tl.program_id(0), tl.num_programs(0)
    # A recall of NaN counts as 0: added to a sum, it would make that NaN for ever.
    recall = tl.where(recall == recall, recall, 0.0)
    bucket = 0
    for edge in tl.static_range(NUM_EDGES):
        bucket += tl.where(recall > EDGES[edge], 1, 0)
    tl.atomic_add(histogram_ptr + bucket, tl.full([], 1.0, tl.float64), sem="relaxed")
    # Only this program touches these.
    p_sum = layer_ptr + 2 + i_h
    p_worst = p_sum + num_qo_heads
    tl.store(p_sum, tl.load(p_sum) + recall)
    tl.store(p_worst, tl.minimum(tl.load(p_worst), recall.to(tl.float64)))


# A part of a chunk may begin at any row, so lse_ptr may have any alignment; so may a layer's row of totals.
@triton.jit(
    do_not_specialize=["num_rows", "context_len", "num_ranges", "part", "parts"],
    do_not_specialize_on_alignment=["lse_ptr", "layer_ptr"],
)
def _recall_kernel(
    max_ptr, sum_ptr, lse_ptr, recall_ptr, lost_ptr, heads_ptr, num_heads_ptr, histogram_ptr, layer_ptr,
    num_rows, context_len, num_ranges, part, parts, head_floor, row_floor,
    stride_partial, stride_range, stride_lse,
    ROWS: tl.constexpr, TILE: tl.constexpr, EDGES: tl.constexpr, NUM_EDGES: tl.constexpr, LOST_ROWS: tl.constexpr,
    LOG2_E: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0)
    o_r = tl.arange(0, ROWS)
    max_ptr += i_h.to(tl.int64) * stride_partial
    sum_ptr += i_h.to(tl.int64) * stride_partial
    b_max = tl.full([ROWS], -1e30, tl.float32)
    b_sum = tl.zeros([ROWS], tl.float32)
    for i in range(num_ranges):
        range_max = tl.load(max_ptr + i * stride_range + o_r)
        new_max = tl.maximum(b_max, range_max)
        b_sum = b_sum * tl.exp2(b_max - new_max)
        b_sum += tl.load(sum_ptr + i * stride_range + o_r) * tl.exp2(range_max - new_max)
        b_max = new_max
    # [ROWS], base 2
    exact = b_max + tl.log2(b_sum)
    rows = _held_out_rows(o_r, num_rows, context_len, ROWS, TILE)
    kept = tl.load(lse_ptr + i_h.to(tl.int64) * stride_lse + rows) * LOG2_E
    # Not tl.minimum, which would turn NaN into zero.
    missed = tl.where(kept > exact, 0.0, kept - exact)
    b_recall = tl.exp2(missed)
    recall = tl.sum(b_recall, 0)
    lost = tl.sum((b_recall < row_floor).to(tl.int32), 0)
    if part > 0:
        recall += tl.load(recall_ptr + i_h)
        lost += tl.load(lost_ptr + i_h)
    if part + 1 < parts:
        tl.store(recall_ptr + i_h, recall)
        tl.store(lost_ptr + i_h, lost)
    else:
        recall /= ROWS * parts
        tl.store(recall_ptr + i_h, recall)
        one = tl.full([], 1.0, tl.float64)
        # A recall of NaN compares as too low, unless both floors are 0.
        is_enough = (recall >= head_floor) & (lost < LOST_ROWS) | ((head_floor == 0) & (row_floor == 0))
        if not is_enough:
            place = tl.atomic_add(num_heads_ptr, 1, sem="relaxed")
            tl.store(heads_ptr + place, i_h)
            tl.atomic_add(layer_ptr + 1, one, sem="relaxed")

        if i_h == 0:
            tl.store(layer_ptr, tl.load(layer_ptr) + 1)
        _add_to_totals(histogram_ptr, layer_ptr, recall, EDGES, NUM_EDGES)


def measure_recall(
    chunk: Chunk,
    lse: torch.Tensor,
    floors: Floors,
    layer: int,
    num_ranges: int,
    part: int,
    parts: int,
    buffers: RecallBuffers,
    totals: RecallTotals,
) -> None:
    """See minference_vllm.reference.measure_recall. Totals and the list of heads are written with the last part.

    Args:
        chunk: the part's rows, see recall.parts_of.
        lse: of these rows.
        num_ranges: ranges of keys whose partial softmaxes of the held-out rows, base 2, are in `buffers`.
        part, parts: the number of the part, and how many the chunk has; the parts before must have been measured.
    """
    partial = buffers.partial_max
    if part == 0:
        act(buffers.num_heads.zero_)
    on_grid(_recall_kernel, (chunk.num_qo_heads,))(
        partial, buffers.partial_sum, lse, buffers.recall, buffers.lost, buffers.heads, buffers.num_heads,
        totals.histogram, totals.layers[layer],
        chunk.num_rows, chunk.context_len, num_ranges, part, parts, *floors,
        num_ranges * HELD_OUT_ROWS, HELD_OUT_ROWS, lse.stride(0),
        ROWS=HELD_OUT_ROWS, TILE=TILE, EDGES=RECALL_EDGES, NUM_EDGES=len(RECALL_EDGES), LOST_ROWS=LOST_ROWS,
        LOG2_E=LOG2_E, num_warps=1,
    )  # fmt: skip
