# SPDX-License-Identifier: Apache-2.0
"""Selects, by the masses of boxes, those that each block of lists scores finely.

The first kernel finds each list's threshold from a histogram of its codes. In the second, a program takes a block of
lists under one KV head. The margin of a box is how far its code lies above the threshold of the list that wants it
most, and a histogram of margins tells which boxes there is room for. Masses are added as integers, so the same codes
give the same boxes.
"""

import torch
import triton
import triton.language as tl

from minference_vllm.boxes import GROUPS_PER_BOX, LISTS, Boxes
from minference_vllm.chunk import Chunk
from minference_vllm.index import HALVES, TILE
from minference_vllm.kernels.triton.codes import weights
from minference_vllm.kernels.triton.launch import on_grid
from minference_vllm.reference.boxes import FIRST_COUNTED, FORCED, OF_PART, PART_OF_DROPPED
from minference_vllm.reference.normalisers import PART
from minference_vllm.scratch import MASS_CODES

CODES_OF_A_BOX = torch.int64
assert CODES_OF_A_BOX.itemsize == GROUPS_PER_BOX

SPAN = 1024
"""Boxes that are processed at once for one list."""

BLOCK = 512
"""Boxes that are processed at once for all lists of a block."""

EDGE = 16
"""Always kept boxes that are weighed at once. There are few of them."""

PLAIN = ["context_len", "num_lists", "group_size", "sink_boxes", "local_boxes", "max_boxes"]


@triton.jit
def _weight_between(codes_ptr, first, end, EDGE: tl.constexpr):
    """The weight of a list's boxes from `first` on, before `end`."""
    total = tl.zeros([], tl.int64)
    for start in range(first, end, EDGE):
        o_n = start + tl.arange(0, EDGE)
        b_code = tl.load(codes_ptr + o_n, mask=o_n < end, other=0).to(tl.int32)
        total += tl.sum(weights(b_code), 0)
    return total


@triton.jit
def _place(
    of_list, i_s, context_len, group_size, sink_boxes, local_boxes, TILE: tl.constexpr, PARTS_PER_TILE: tl.constexpr
):
    """A list's head, its part, how many boxes lie before its tile, and between which two they may be dropped."""
    part = of_list // group_size
    before = context_len // TILE + part // PARTS_PER_TILE
    sinks = tl.minimum(sink_boxes, before)
    return i_s * group_size + of_list % group_size, part, before, sinks, tl.maximum(before - local_boxes, sinks)


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=["share_ptr"])
def _thresholds_kernel(
    box_masses_ptr, share_ptr, thresholds_ptr,
    context_len, num_lists, group_size, sink_boxes, local_boxes,
    stride_bm, stride_bp, stride_thresholds,
    TILE: tl.constexpr, PARTS_PER_TILE: tl.constexpr, PART_WEIGHT: tl.constexpr, PART_OF_DROPPED: tl.constexpr,
    FIRST_COUNTED: tl.constexpr, SPAN: tl.constexpr, EDGE: tl.constexpr,
    CODES: tl.constexpr,
):  # fmt: skip
    """The smallest code with which each list keeps a box: see reference.groups.threshold."""
    i_l, i_s = tl.program_id(0), tl.program_id(1)
    head, part, num_boxes, sinks, local = _place(
        i_l, i_s, context_len, group_size, sink_boxes, local_boxes, TILE, PARTS_PER_TILE
    )  # fmt: skip
    codes_ptr = box_masses_ptr + head.to(tl.int64) * stride_bm + part.to(tl.int64) * stride_bp
    b_count = tl.zeros([CODES], tl.int32)
    for start in range(0, num_boxes, SPAN):
        o_n = start + tl.arange(0, SPAN)
        b_code = tl.load(codes_ptr + o_n, mask=o_n < num_boxes, other=0).to(tl.int32)
        b_count += tl.histogram(b_code, CODES, mask=(o_n >= sinks) & (o_n < local))
    # [CODES]; the mass that is dropped if all boxes of this code and of smaller ones are
    dropped = tl.cumsum(b_count.to(tl.int64) * weights(tl.arange(0, CODES)), 0)
    total = PART_WEIGHT + tl.max(dropped, 0)
    total += _weight_between(codes_ptr, FIRST_COUNTED, sinks, EDGE)
    total += _weight_between(codes_ptr, tl.maximum(local, FIRST_COUNTED), num_boxes, EDGE)
    # In 64 bits, to get exactly the number that the reference gets.
    drops = PART_OF_DROPPED * (1 - tl.load(share_ptr + head).to(tl.float64))
    allowed = (drops * total.to(tl.float64)).to(tl.int64)
    threshold = tl.minimum(tl.sum((dropped <= allowed).to(tl.int32), 0), CODES - 1)
    tl.store(thresholds_ptr + head.to(tl.int64) * stride_thresholds + part, threshold)


@triton.jit
def _margins(p_codes, b_before, b_sinks, b_local, b_threshold, o_n, FORCED: tl.constexpr):
    """[BLOCK] by how far boxes lie above the threshold of the list that wants them most."""
    seen = o_n[None, :] < b_before[:, None]
    free = (o_n[None, :] >= b_sinks[:, None]) & (o_n[None, :] < b_local[:, None])
    b_code = tl.load(p_codes[:, None] + o_n[None, :], mask=seen, other=0).to(tl.int32)
    b_margin = tl.where(free, b_code - b_threshold[:, None], tl.where(seen, FORCED, -FORCED))
    return tl.max(b_margin, 0)


@triton.jit
def _cut(b_count, room, FORCED: tl.constexpr):
    """The smallest margin that fits, and how many boxes of the next smaller margin there is room for beside it.

    A margin fits if there is room for all boxes of it and of larger ones. If margin 0 fits, both results are 0.
    """
    o_m = tl.arange(0, 2 * FORCED)
    # [2 FORCED]: how many have this margin or a larger one
    b_above = tl.sum(b_count, 0) - tl.cumsum(b_count, 0) + b_count
    cut = tl.sum((b_above > room).to(tl.int32), 0)
    above = tl.sum(tl.where(o_m >= cut, b_count, 0), 0)
    return cut, tl.where(cut > 0, room - above, 0)


@triton.jit(do_not_specialize=PLAIN)
def _boxes_kernel(
    box_masses_ptr, thresholds_ptr, numbers_ptr, counts_ptr, masses_ptr,
    context_len, num_lists, group_size, sink_boxes, local_boxes, max_boxes,
    stride_bm, stride_bp, stride_thresholds, stride_ns, stride_nb, stride_counts, stride_mh, stride_mp,
    TILE: tl.constexpr, PARTS_PER_TILE: tl.constexpr, FORCED: tl.constexpr,
    LISTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_b, i_s = tl.program_id(0), tl.program_id(1)
    # [LISTS]; past the end, the last list is repeated
    o_l = tl.minimum(i_b * LISTS + tl.arange(0, LISTS), num_lists - 1)
    i_h, part, b_before, b_sinks, b_local = _place(
        o_l, i_s, context_len, group_size, sink_boxes, local_boxes, TILE, PARTS_PER_TILE
    )  # fmt: skip
    p_codes = box_masses_ptr + i_h.to(tl.int64) * stride_bm + part.to(tl.int64) * stride_bp
    b_threshold = tl.load(thresholds_ptr + i_h.to(tl.int64) * stride_thresholds + part)
    num_boxes = tl.max(b_before, 0)

    b_count = tl.zeros([2 * FORCED], tl.int32)
    for start in range(0, num_boxes, BLOCK):
        b_margin = _margins(p_codes, b_before, b_sinks, b_local, b_threshold, start + tl.arange(0, BLOCK), FORCED)
        b_count += tl.histogram(tl.maximum(b_margin, 0), 2 * FORCED, mask=b_margin >= 0)
    cut, room = _cut(b_count, max_boxes, FORCED)

    numbers_ptr += i_s.to(tl.int64) * stride_ns + i_b.to(tl.int64) * stride_nb
    p_boxes = masses_ptr + i_h.to(tl.int64) * stride_mh + part.to(tl.int64) * stride_mp
    count = 0
    for start in range(0, num_boxes, BLOCK):
        # [BLOCK], [LISTS, BLOCK]
        o_n = start + tl.arange(0, BLOCK)
        b_margin = _margins(p_codes, b_before, b_sinks, b_local, b_threshold, o_n, FORCED)
        at_cut = (b_margin == cut - 1) & (cut > 0)
        rank = tl.cumsum(at_cut.to(tl.int32), 0)
        kept = ((b_margin >= cut) | (at_cut & (rank <= room))).to(tl.int32)
        room -= tl.minimum(tl.max(rank, 0), room)
        place = count + tl.cumsum(kept, 0) - 1
        tl.store(numbers_ptr + place, o_n, mask=kept > 0)
        count += tl.sum(kept, 0)
        dropped = (kept == 0)[None, :] & (o_n[None, :] < b_before[:, None])
        tl.store(p_boxes[:, None] + o_n[None, :], tl.zeros([LISTS, BLOCK], tl.int64), mask=dropped)
    tl.store(counts_ptr + i_s * stride_counts + i_b, count)


def select_boxes(
    box_masses: torch.Tensor,
    chunk: Chunk,
    share: torch.Tensor,
    rows_per_half: int,
    sink_boxes: int,
    local_boxes: int,
    boxes: Boxes,
    masses: torch.Tensor,
) -> None:
    """See minference_vllm.reference.select_boxes. The last dimension of all tensors is contiguous.

    Rows of `masses` must begin at multiples of GROUPS_PER_BOX: the codes of a box are written as one word.
    """
    words = masses.view(CODES_OF_A_BOX)
    numbers, counts, thresholds = boxes.numbers, boxes.counts, boxes.thresholds
    group_size, sets = chunk.group_size, chunk.kv.num_kv_heads
    parts_per_tile = HALVES * rows_per_half // PART
    num_lists = chunk.num_tiles * parts_per_tile * group_size
    forced = (sink_boxes, local_boxes)
    strides, shape = (box_masses.stride(0), box_masses.stride(1)), dict(TILE=TILE, PARTS_PER_TILE=parts_per_tile)
    on_grid(_thresholds_kernel, (num_lists, sets))(
        box_masses, share, thresholds, chunk.context_len, num_lists, group_size, *forced,
        *strides, thresholds.stride(0),
        **shape, PART_WEIGHT=OF_PART, PART_OF_DROPPED=PART_OF_DROPPED, FIRST_COUNTED=FIRST_COUNTED,
        SPAN=SPAN, EDGE=EDGE, CODES=MASS_CODES, num_warps=4,
    )  # fmt: skip
    on_grid(_boxes_kernel, (triton.cdiv(num_lists, LISTS), sets))(
        box_masses, thresholds, numbers, counts, words,
        chunk.context_len, num_lists, group_size, *forced, numbers.shape[2],
        *strides, thresholds.stride(0), numbers.stride(0), numbers.stride(1), counts.stride(0),
        words.stride(0), words.stride(1),
        **shape, FORCED=FORCED, LISTS=LISTS, BLOCK=BLOCK,
        num_warps=8,
    )  # fmt: skip
