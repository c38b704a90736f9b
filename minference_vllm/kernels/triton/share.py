# SPDX-License-Identifier: Apache-2.0
"""How many of the heaviest entries hold a share of a row's mass: select's histogram, the mass of the row, prefix sums.

No sort, no host sync, nothing allocated; masses are added as integers, so the same masses give the same sizes.
"""

import torch
import triton
import triton.language as tl

from minference_vllm.kernels.tape import act
from minference_vllm.kernels.triton.launch import on_grid
from minference_vllm.kernels.triton.select import ANYWHERE, BLOCK, _weigh
from minference_vllm.scratch import SELECT_BINS, SELECT_SPLITS, SelectBuffers


@triton.jit(do_not_specialize=["length", "blocks_each"], do_not_specialize_on_alignment=ANYWHERE[1:])
def _tally_kernel(
    mass_ptr, histogram_ptr, totals_ptr, forced_ptr, length, blocks_each, stride_mass, stride_forced,
    BLOCK: tl.constexpr, BINS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """How many entries of a range have each weight, 0 left out, and the mass of all of them."""
    i_h, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mass_ptr += i_h * stride_mass
    forced = tl.load(forced_ptr + i_h * stride_forced)
    start = i_s * blocks_each * BLOCK
    b_count = tl.zeros([BINS], tl.int32)
    b_total = tl.zeros([BLOCK], tl.int64)
    for first in range(start, tl.minimum(start + blocks_each * BLOCK, length), BLOCK):
        # [BLOCK]
        o_n = first + tl.arange(0, BLOCK)
        b_mass = tl.load(mass_ptr + o_n, mask=o_n < length, other=0)
        b_weight = _weigh(b_mass, o_n, length, forced, BINS)
        b_count += tl.histogram(b_weight, BINS, mask=b_weight > 0)
        b_total += b_mass
    tl.atomic_add(histogram_ptr + i_h * BINS + tl.arange(0, BINS), b_count, mask=b_count > 0, sem="relaxed")
    tl.store(totals_ptr + i_h * SPLITS + i_s, tl.sum(b_total, 0))


@triton.jit(do_not_specialize=["max_keep", "splits"], do_not_specialize_on_alignment=["share_ptr", "keep_ptr"])
def _sizes_kernel(
    histogram_ptr, totals_ptr, share_ptr, keep_ptr, max_keep, splits, stride_share, stride_keep,
    BINS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, SPLITS)
    total = tl.sum(tl.load(totals_ptr + i_h * SPLITS + o_s, mask=o_s < splits, other=0), 0)
    # In 64 bits, to get exactly the number that the reference gets.
    share = tl.load(share_ptr + i_h * stride_share).to(tl.float64)
    allowed = ((1 - share) * total.to(tl.float64)).to(tl.int64)
    # [BINS]; weightless entries are not counted, and would add nothing
    o_bin = tl.arange(0, BINS)
    b_count = tl.load(histogram_ptr + i_h * BINS + o_bin)
    # See reference.share.largest_masses.
    b_largest = tl.ceil(((o_bin + 8128) << 17).to(tl.float32, bitcast=True)).to(tl.int64) - 1
    dropped = tl.cumsum(b_count.to(tl.int64) * b_largest, 0)
    is_kept = (dropped > allowed) | (o_bin == BINS - 1)
    tl.store(keep_ptr + i_h * stride_keep, tl.minimum(tl.sum(tl.where(is_kept, b_count, 0), 0), max_keep))


def share_sizes(
    mass: torch.Tensor,
    length: int,
    share: torch.Tensor,
    forced: torch.Tensor,
    max_keep: int,
    keep: torch.Tensor,
    buffers: SelectBuffers,
) -> None:
    """See minference_vllm.reference.share_sizes."""
    num_heads, blocks = mass.shape[0], triton.cdiv(length, BLOCK)
    blocks_each = triton.cdiv(blocks, SELECT_SPLITS)
    splits = triton.cdiv(blocks, blocks_each)
    histogram, totals = buffers.histogram, buffers.totals
    shape = dict(BINS=SELECT_BINS, SPLITS=SELECT_SPLITS, num_warps=8)
    act(histogram.zero_)
    on_grid(_tally_kernel, (num_heads, splits))(
        mass, histogram, totals, forced, length, blocks_each, mass.stride(0), forced.stride(0), BLOCK=BLOCK, **shape
    )
    on_grid(_sizes_kernel, (num_heads,))(
        histogram, totals, share, keep, max_keep, splits, share.stride(0), keep.stride(0), **shape
    )
