# SPDX-License-Identifier: Apache-2.0
"""The heaviest entries of a row of masses: a histogram, the threshold it gives, a compaction in index order.

Every row is cut into ranges that are processed in parallel. No sort, no host sync, nothing allocated; the same masses
give the same entries.
"""

import torch
import triton
import triton.language as tl

from minference_vllm.kernels.tape import act
from minference_vllm.kernels.triton.launch import on_grid
from minference_vllm.scratch import SELECT_BINS, SELECT_SPLITS, SelectBuffers

BLOCK = 4096
PLAIN = ["length", "max_keep", "num_marks", "blocks_each"]
ANYWHERE = ["keep_ptr", "forced_ptr"]  # columns of tensors with one row for each head, so at any alignment


@triton.jit
def _weigh(b_mass, o_n, length, forced, BINS: tl.constexpr):
    """Weights of the entries o_n: see reference.select.weights; -1 past the end."""
    # Six bits of mantissa; 8127 puts a mass of 1 at weight 1.
    b_weight = tl.maximum((b_mass.to(tl.float32).to(tl.int32, bitcast=True) >> 17) - 8127, 0)
    b_weight = tl.where(o_n < forced, BINS - 1, b_weight)
    return tl.where(o_n < length, b_weight, -1)


@triton.jit
def _weights(mass_ptr, start, length, forced, BLOCK: tl.constexpr, BINS: tl.constexpr):
    """Weights of BLOCK entries from `start` on, and which entries these are."""
    o_n = start + tl.arange(0, BLOCK)
    b_mass = tl.load(mass_ptr + o_n, mask=o_n < length, other=0)
    return _weigh(b_mass, o_n, length, forced, BINS), o_n


@triton.jit
def _threshold(histogram_ptr, length, keep, BINS: tl.constexpr):
    """The weight of the last entry to keep, and how many entries of that very weight are kept."""
    o_bin = tl.arange(0, BINS)
    b_count = tl.load(histogram_ptr + o_bin)
    b_count = tl.where(o_bin == 0, length - tl.sum(b_count, 0), b_count)
    reaching = length - tl.cumsum(b_count, 0) + b_count
    threshold = tl.max(tl.where(reaching >= keep, o_bin, 0), 0)
    return threshold, keep - tl.sum(tl.where(o_bin > threshold, b_count, 0), 0)


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=ANYWHERE)
def _histogram_kernel(
    mass_ptr, histogram_ptr, forced_ptr, length, blocks_each, stride_mass, stride_forced,
    BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    i_h, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mass_ptr += i_h * stride_mass
    forced = tl.load(forced_ptr + i_h * stride_forced)
    start = i_s * blocks_each * BLOCK
    b_count = tl.zeros([BINS], tl.int32)
    for first in range(start, tl.minimum(start + blocks_each * BLOCK, length), BLOCK):
        b_weight, _ = _weights(mass_ptr, first, length, forced, BLOCK, BINS)
        # Entries of weight 0, most of a row, are not counted: their number follows from that of the others.
        b_count += tl.histogram(b_weight, BINS, mask=b_weight > 0)
    tl.atomic_add(histogram_ptr + i_h * BINS + tl.arange(0, BINS), b_count, mask=b_count > 0, sem="relaxed")


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=ANYWHERE)
def _count_kernel(
    mass_ptr, histogram_ptr, counts_ptr, keep_ptr, forced_ptr, length, max_keep, blocks_each,
    stride_mass, stride_keep, stride_forced,
    BLOCK: tl.constexpr, BINS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    i_h, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mass_ptr += i_h * stride_mass
    keep = tl.minimum(tl.load(keep_ptr + i_h * stride_keep), max_keep)
    forced = tl.load(forced_ptr + i_h * stride_forced)
    threshold, _kept_ties = _threshold(histogram_ptr + i_h * BINS, length, keep, BINS)
    start = i_s * blocks_each * BLOCK
    heavier = 0
    ties = 0
    for first in range(start, tl.minimum(start + blocks_each * BLOCK, length), BLOCK):
        b_weight, _ = _weights(mass_ptr, first, length, forced, BLOCK, BINS)
        heavier += tl.sum((b_weight > threshold).to(tl.int32), 0)
        ties += tl.sum((b_weight == threshold).to(tl.int32), 0)
    tl.store(counts_ptr + (i_h * SPLITS + i_s) * 2, heavier)
    tl.store(counts_ptr + (i_h * SPLITS + i_s) * 2 + 1, ties)


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=ANYWHERE)
def _compact_kernel(
    mass_ptr, histogram_ptr, counts_ptr, keep_ptr, forced_ptr, indptr_ptr, out_ptr,
    length, max_keep, num_marks, blocks_each, stride_mass, stride_keep, stride_forced, stride_indptr, stride_out,
    GRAIN: tl.constexpr, HAS_OUT: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    i_h, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mass_ptr += i_h * stride_mass
    indptr_ptr += i_h * stride_indptr
    out_ptr += i_h * stride_out
    keep = tl.minimum(tl.load(keep_ptr + i_h * stride_keep), max_keep)
    forced = tl.load(forced_ptr + i_h * stride_forced)
    threshold, ties = _threshold(histogram_ptr + i_h * BINS, length, keep, BINS)
    o_s = tl.arange(0, SPLITS)
    p_counts = counts_ptr + (i_h * SPLITS + o_s) * 2
    ties_before = tl.sum(tl.load(p_counts + 1, mask=o_s < i_s, other=0), 0)
    kept_before = tl.sum(tl.load(p_counts, mask=o_s < i_s, other=0), 0) + tl.minimum(ties_before, ties)
    start = i_s * blocks_each * BLOCK
    for first in range(start, tl.minimum(start + blocks_each * BLOCK, num_marks * GRAIN), BLOCK):
        b_weight, o_n = _weights(mass_ptr, first, length, forced, BLOCK, BINS)
        is_tie = (b_weight == threshold).to(tl.int32)
        tie_rank = ties_before + tl.cumsum(is_tie, 0) - is_tie
        kept = ((b_weight > threshold) | ((is_tie > 0) & (tie_rank < ties))).to(tl.int32)
        rank = kept_before + tl.cumsum(kept, 0) - kept
        tl.store(indptr_ptr + o_n // GRAIN, rank, mask=(o_n % GRAIN == 0) & (o_n < num_marks * GRAIN))
        if HAS_OUT:
            tl.store(out_ptr + rank, o_n, mask=kept > 0)
        kept_before += tl.sum(kept, 0)
        ties_before += tl.sum(is_tie, 0)


def select(
    mass: torch.Tensor,
    length: int,
    keep: torch.Tensor,
    forced: torch.Tensor,
    indptr: torch.Tensor,
    grain: int,
    out: torch.Tensor | None,
    buffers: SelectBuffers,
) -> None:
    """See minference_vllm.reference.select."""
    num_marks = indptr.shape[1]
    blocks = triton.cdiv(num_marks * grain, BLOCK)
    blocks_each = triton.cdiv(blocks, SELECT_SPLITS)
    grid = (mass.shape[0], triton.cdiv(blocks, blocks_each))
    max_keep = length if out is None else min(length, out.shape[1])
    histogram, counts = buffers.histogram, buffers.counts
    shape = dict(BLOCK=BLOCK, BINS=SELECT_BINS, num_warps=8)
    act(histogram.zero_)
    on_grid(_histogram_kernel, grid)(
        mass, histogram, forced, length, blocks_each, mass.stride(0), forced.stride(0), **shape
    )  # fmt: skip
    on_grid(_count_kernel, grid)(
        mass, histogram, counts, keep, forced, length, max_keep, blocks_each,
        mass.stride(0), keep.stride(0), forced.stride(0), SPLITS=SELECT_SPLITS, **shape,
    )  # fmt: skip
    on_grid(_compact_kernel, grid)(
        mass, histogram, counts, keep, forced, indptr, indptr if out is None else out,
        length, max_keep, num_marks, blocks_each,
        mass.stride(0), keep.stride(0), forced.stride(0), indptr.stride(0), 0 if out is None else out.stride(0),
        GRAIN=grain, HAS_OUT=out is not None, SPLITS=SELECT_SPLITS, **shape,
    )  # fmt: skip
