# SPDX-License-Identifier: Apache-2.0
"""Lists, by the masses of groups, those that each tile keeps: one program for each tile and head.

A histogram of the codes gives the threshold and, where both halves keep the same, how many groups stay; then they are
written in ascending order. No sort, no host sync, and masses are added as integers: the same codes give the same lists.
"""

import torch
import triton
import triton.language as tl

from minference_vllm.chunk import Chunk
from minference_vllm.index import EVERY_GROUP, GROUP, GROUPS_PER_TILE, HALF, TILE, TileIndex
from minference_vllm.kernels.triton.codes import decode, encode, weights
from minference_vllm.kernels.triton.launch import on_grid
from minference_vllm.reference.groups import ROW
from minference_vllm.reference.normalisers import NORMALISER_KEYS, PART
from minference_vllm.scratch import MASS_CODES

BLOCK = 1024

EDGE = 64
"""Groups that are weighed at once where the histogram has none or too many. They are few."""

PLAIN = ["num_rows", "context_len", "rows_per_half", "sink_groups", "local_groups", "long_groups", "max_kept"]


@triton.jit
def _mass(codes_ptr, part, stride, o_g, num_groups):
    """Masses of a part."""
    return decode(tl.load(codes_ptr + part * stride + o_g, mask=o_g < num_groups, other=0).to(tl.int32))


@triton.jit
def _half_masses(codes_ptr, stride, o_g, num_groups, PARTS: tl.constexpr):
    """Sums of the masses of a half's parts: see reference.codes.add."""
    b_mass = _mass(codes_ptr, 0, stride, o_g, num_groups)
    if PARTS > 1:
        b_mass += _mass(codes_ptr, 1, stride, o_g, num_groups)
    if PARTS > 2:
        b_mass += _mass(codes_ptr, 2, stride, o_g, num_groups) + _mass(codes_ptr, 3, stride, o_g, num_groups)
    return b_mass


@triton.jit
def _half_codes(codes_ptr, stride, o_g, num_groups, PARTS: tl.constexpr):
    """Codes of the sums of the masses of a half's parts."""
    if PARTS == 1:
        return tl.load(codes_ptr + o_g, mask=o_g < num_groups, other=0).to(tl.int32)
    return encode(_half_masses(codes_ptr, stride, o_g, num_groups, PARTS))


@triton.jit
def _threshold(
    codes_ptr, other_ptr, stride, share, rows_weight, num_groups, sinks, local, long_groups,
    PARTS: tl.constexpr, BY_TILE: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr,
    CODES: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """The threshold, see reference.groups.threshold, and how many groups are dropped.

    Groups before `sinks` and from `local` on are always kept. rows_weight is the weight of what the rows' normalisers
    include; the mass of groups from COUNTED on is added to it. With BY_TILE the codes of the sums of both halves'
    masses overwrite those of the first part, and _codes reads them there.
    """
    b_count = tl.zeros([CODES], tl.int32)
    for start in range(0, num_groups, BLOCK):
        o_g = start + tl.arange(0, BLOCK)
        if BY_TILE:
            b_mass = _half_masses(codes_ptr, stride, o_g, num_groups, PARTS)
            b_code = encode(b_mass + _half_masses(other_ptr, stride, o_g, num_groups, PARTS))
            tl.store(codes_ptr + o_g, b_code.to(tl.uint8), mask=o_g < num_groups)
        else:
            b_code = _half_codes(codes_ptr, stride, o_g, num_groups, PARTS)
        b_count += tl.histogram(b_code, CODES, mask=(o_g >= sinks) & (o_g < local))
    if BY_TILE:
        tl.debug_barrier()  # threads read below what other threads have written
    # [CODES]; the mass that is dropped if all groups of this code and of smaller ones are
    dropped = tl.cumsum(b_count.to(tl.int64) * weights(tl.arange(0, CODES)), 0)
    # The total is over all groups from COUNTED on. `dropped` has all free groups, so those that are not free are added,
    # and free ones before COUNTED subtracted: both are few.
    total = rows_weight + tl.max(dropped, 0)
    for start in range(tl.maximum(local, COUNTED), num_groups, EDGE):
        total += _edge(codes_ptr, stride, start, num_groups, num_groups, PARTS, BY_TILE, EDGE)
    for start in range(COUNTED, sinks, EDGE):
        total += _edge(codes_ptr, stride, start, sinks, num_groups, PARTS, BY_TILE, EDGE)
    for start in range(sinks, tl.minimum(COUNTED, local), EDGE):
        end = tl.minimum(COUNTED, local)
        total -= _edge(codes_ptr, stride, start, end, num_groups, PARTS, BY_TILE, EDGE)
    # In 64 bits and in this order, to get exactly the numbers that the reference gets.
    whole = total.to(tl.float64)
    drops = 1 - share.to(tl.float64)
    gone = dropped.to(tl.float64)
    compared = tl.maximum(num_groups, long_groups).to(tl.float64)
    heaviness = weights(tl.arange(0, CODES)).to(tl.float64) * compared
    limit = drops * drops * drops * whole * whole * whole * num_groups.to(tl.float64)
    may_be_dropped = gone * gone * heaviness * compared <= limit
    threshold = tl.minimum(tl.sum(may_be_dropped.to(tl.int32), 0), CODES - 1)
    return threshold, tl.sum(tl.where(tl.arange(0, CODES) < threshold, b_count, 0), 0)


@triton.jit
def _codes(codes_ptr, stride, o_g, num_groups, PARTS: tl.constexpr, BY_TILE: tl.constexpr):
    """Codes of a half's masses or, with BY_TILE, those of both halves, which _threshold has written."""
    return _half_codes(codes_ptr, stride, o_g, num_groups, 1 if BY_TILE else PARTS)


@triton.jit
def _edge(
    codes_ptr, stride, start, end, num_groups,
    PARTS: tl.constexpr, BY_TILE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Weight of the groups from `start` on, EDGE at the most, before `end`."""
    o_g = start + tl.arange(0, EDGE)
    b_code = _codes(codes_ptr, stride, o_g, num_groups, PARTS, BY_TILE)
    return tl.sum(tl.where(o_g < end, weights(b_code), 0), 0)


@triton.jit
def _kept(
    codes_ptr, stride, o_g, num_groups, sinks, local, threshold,
    PARTS: tl.constexpr, BY_TILE: tl.constexpr,
):  # fmt: skip
    b_code = _codes(codes_ptr, stride, o_g, num_groups, PARTS, BY_TILE)
    return ((b_code >= threshold) | (o_g < sinks) | (o_g >= local)) & (o_g < num_groups)


@triton.jit
def _kept_by_halves(
    first_ptr, second_ptr, stride, o_g, num_groups, sinks, local, first_threshold, second_threshold,
    PARTS: tl.constexpr, BY_TILE: tl.constexpr,
):  # fmt: skip
    """1 for the groups that both halves keep, only the first, only the second, int32. By tile both keep the same."""
    first = _kept(first_ptr, stride, o_g, num_groups, sinks, local, first_threshold, PARTS, BY_TILE).to(tl.int32)
    second = first
    if not BY_TILE:
        second = _kept(second_ptr, stride, o_g, num_groups, sinks, local, second_threshold, PARTS, BY_TILE).to(tl.int32)
    return first & second, first & ~second, second & ~first


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=["share_ptr"])
def _groups_kernel(
    masses_ptr, share_ptr, groups_ptr, counts_ptr,
    num_rows, context_len, rows_per_half, sink_groups, local_groups, long_groups, max_kept,
    stride_masses, stride_part, stride_groups, stride_groups_tile, stride_counts,
    TILE: tl.constexpr, HALF: tl.constexpr, GROUPS_PER_TILE: tl.constexpr, EVERY_GROUP: tl.constexpr,
    PARTS: tl.constexpr, BY_TILE: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr,
    CODES: tl.constexpr, COUNTED: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    i_t, i_h = tl.program_id(0), tl.program_id(1)
    tile_start = (context_len // TILE + i_t) * TILE
    num_groups = tile_start // TILE * GROUPS_PER_TILE
    sinks = tl.minimum(sink_groups, num_groups)
    local = tl.maximum(num_groups - local_groups, sinks)
    # A half of which the chunk has no row keeps what the other keeps.
    first_half = tl.where(tile_start + HALF <= context_len, 1, 0)
    second_half = tl.where(tile_start + HALF >= context_len + num_rows, 0, 1)
    masses_ptr += i_h.to(tl.int64) * stride_masses
    first_ptr = masses_ptr + ((i_t * 2 + first_half) * PARTS).to(tl.int64) * stride_part
    second_ptr = masses_ptr + ((i_t * 2 + second_half) * PARTS).to(tl.int64) * stride_part
    share = tl.load(share_ptr + i_h)
    rows_weight = rows_per_half.to(tl.int64) * (2 * ROW if BY_TILE else ROW)
    first, num_dropped = _threshold(
        first_ptr, second_ptr, stride_part, share, rows_weight, num_groups, sinks, local, long_groups,
        PARTS, BY_TILE, BLOCK, EDGE, CODES, COUNTED,
    )  # fmt: skip
    second = first
    o_n = tl.arange(0, BLOCK)
    num_shared = num_groups - num_dropped
    num_first = 0
    num_second = 0
    if not BY_TILE:
        second, _dropped = _threshold(
            second_ptr, first_ptr, stride_part, share, rows_weight, num_groups, sinks, local, long_groups,
            PARTS, BY_TILE, BLOCK, EDGE, CODES, COUNTED,
        )  # fmt: skip
        b_shared = tl.zeros([BLOCK], tl.int32)
        b_first = tl.zeros([BLOCK], tl.int32)
        b_second = tl.zeros([BLOCK], tl.int32)
        for start in range(0, num_groups, BLOCK):
            # [BLOCK]
            shared, first_only, second_only = _kept_by_halves(
                first_ptr, second_ptr, stride_part, start + o_n, num_groups, sinks, local, first, second,
                PARTS, BY_TILE,
            )  # fmt: skip
            b_shared += shared
            b_first += first_only
            b_second += second_only
        num_shared, num_first, num_second = tl.sum(b_shared, 0), tl.sum(b_first, 0), tl.sum(b_second, 0)
    fits = num_shared + num_first + num_second <= max_kept
    p_counts = counts_ptr + i_h.to(tl.int64) * stride_counts + i_t * 3
    tl.store(p_counts, tl.where(fits, num_shared, EVERY_GROUP))
    tl.store(p_counts + 1, tl.where(fits, num_first, 0))
    tl.store(p_counts + 2, tl.where(fits, num_second, 0))

    groups_ptr += i_h.to(tl.int64) * stride_groups + i_t.to(tl.int64) * stride_groups_tile
    next_shared = 0
    next_first = num_shared
    next_second = num_shared + num_first
    for start in range(0, tl.where(fits, num_groups, 0), BLOCK):
        shared, first_only, second_only = _kept_by_halves(
            first_ptr, second_ptr, stride_part, start + o_n, num_groups, sinks, local, first, second,
            PARTS, BY_TILE,
        )  # fmt: skip
        place = tl.where(
            shared > 0,
            next_shared + tl.cumsum(shared, 0),
            tl.where(first_only > 0, next_first + tl.cumsum(first_only, 0), next_second + tl.cumsum(second_only, 0)),
        )
        tl.store(groups_ptr + place - 1, start + o_n, mask=(shared | first_only | second_only) > 0)
        next_shared += tl.sum(shared, 0)
        next_first += tl.sum(first_only, 0)
        next_second += tl.sum(second_only, 0)


def select_groups(
    masses: torch.Tensor,
    chunk: Chunk,
    share: torch.Tensor,
    rows_per_half: int,
    sink_groups: int,
    local_groups: int,
    long_groups: int,
    by_tile: bool,
    index: TileIndex,
) -> None:
    """See minference_vllm.reference.select_groups. `share` and the last dimension of the others are contiguous."""
    groups, counts = index.groups, index.counts
    on_grid(_groups_kernel, (chunk.num_tiles, chunk.num_qo_heads))(
        masses, share, groups, counts,
        chunk.num_rows, chunk.context_len, rows_per_half, sink_groups, local_groups, long_groups, groups.shape[2],
        masses.stride(0), masses.stride(1), groups.stride(0), groups.stride(1), counts.stride(0),
        TILE=TILE, HALF=HALF, GROUPS_PER_TILE=GROUPS_PER_TILE, EVERY_GROUP=EVERY_GROUP,
        PARTS=rows_per_half // PART, BY_TILE=by_tile, BLOCK=BLOCK, EDGE=EDGE,
        CODES=MASS_CODES, COUNTED=NORMALISER_KEYS // GROUP, ROW=ROW,
        num_warps=4,
    )  # fmt: skip
