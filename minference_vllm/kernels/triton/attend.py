# SPDX-License-Identifier: Apache-2.0
"""Attention of a chunk over the keys that a BandIndex keeps, read from the pages through the block table.

One program is one tile of one query head. It reads its kept keys BLOCK_N at a time: the tile's own keys under a causal
mask, then bands that both halves of the tile see without a mask, then bands of one half and columns. In these last two,
a key is masked for the rows of a half that does not see it, or that has seen it in a band already.
"""

import functools

import torch
import triton
import triton.language as tl

from minference_vllm.chunk import Chunk
from minference_vllm.index import BAND, TILE, BandIndex
from minference_vllm.kernels.triton.launch import (
    LOG2_E,
    SCALE_STRIDES,
    SCALES,
    all_scales,
    kv_strides,
    on_grid,
    scaled,
    scaled_scores,
)
from minference_vllm.kernels.triton.operands import dot_operand, value_operand
from minference_vllm.scratch import AttendBuffers

# Run-time integers whose value or alignment must not select another compiled variant.
PLAIN = ["num_rows", "context_len", "table_row", "stride_table", *SCALE_STRIDES]
# Nor must the alignment of these pointers: each layer has its own scales and sinks, at any address.
ANYWHERE = [*SCALES, "sinks_ptr"]


@triton.jit
def _attend_to(
    b_q, acc, row_max, row_sum, keys, in_cache, keep, scale_log2,
    k_ptr, v_ptr, table_ptr, stride_kp, stride_kt,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax step over the keys at positions `keys`; `keep` broadcasts to [TILE, BLOCK_N]."""
    o_d = tl.arange(0, HEAD_DIM)
    if MASKED:
        pages = tl.load(table_ptr + keys // PAGE_SIZE, mask=in_cache, other=0)
    else:
        pages = tl.load(table_ptr + keys // PAGE_SIZE)
    # [BLOCK_N], 64-bit: a cache holds more than 2^31 elements
    o_slot = pages.to(tl.int64) * stride_kp + (keys % PAGE_SIZE) * stride_kt
    if MASKED:
        # Zero, not garbage: 0 * NaN of an unused slot would reach the output.
        b_k = tl.load(k_ptr + o_slot[None, :] + o_d[:, None], mask=in_cache[None, :], other=0.0)
        b_v = tl.load(v_ptr + o_slot[:, None] + o_d[None, :], mask=in_cache[:, None], other=0.0)
    else:
        b_k = tl.load(k_ptr + o_slot[None, :] + o_d[:, None])
        b_v = tl.load(v_ptr + o_slot[:, None] + o_d[None, :])
    # If queries and keys are both FP8, they are multiplied as FP8.
    b_k = dot_operand(b_k, b_q.dtype, UPCAST)
    b_v = value_operand(b_v, UPCAST)
    # [TILE, BLOCK_N]
    b_s = tl.dot(b_q, b_k)
    if MASKED:
        b_s = tl.where(keep, b_s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(b_s, 1) * scale_log2)
    b_p = tl.exp2(b_s * scale_log2 - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(b_p, 1)
    acc = acc * rescale[:, None]
    acc = tl.dot(b_p.to(b_v.dtype), b_v, acc)
    return acc, new_max, row_sum


@triton.jit
def _attend_to_own_tile(
    q_ptr, rows, in_chunk, o_m, start_m, seq_len, scale_log2,
    k_ptr, v_ptr, table_ptr, stride_qt, stride_kp, stride_kt,
    HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The tile's queries, and their online softmax over the tile's own keys, which give every row a finite maximum."""
    o_d = tl.arange(0, HEAD_DIM)
    # [TILE, HEAD_DIM]
    b_q = tl.load(q_ptr + rows[:, None] * stride_qt + o_d[None, :], mask=in_chunk[:, None], other=0.0)
    b_q = dot_operand(b_q, b_q.dtype, UPCAST)
    acc = tl.zeros([TILE, HEAD_DIM], tl.float32)
    row_max = tl.full([TILE], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE], tl.float32)
    for start in range(0, TILE, BLOCK_N):
        keys = start_m + start + tl.arange(0, BLOCK_N)
        acc, row_max, row_sum = _attend_to(
            b_q, acc, row_max, row_sum, keys, keys < seq_len, keys[None, :] <= o_m[:, None], scale_log2,
            k_ptr, v_ptr, table_ptr, stride_kp, stride_kt, HEAD_DIM, PAGE_SIZE, True, UPCAST,
        )  # fmt: skip
    return b_q, acc, row_max, row_sum


@triton.jit
def _store_rows(
    out_ptr, lse_ptr, sinks_ptr, i_h, acc, row_max, row_sum, rows, in_chunk, stride_ot,
    HEAD_DIM: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """Write the rows' outputs and natural log-sum-exps over keys; out_ptr and lse_ptr are at head i_h already."""
    total = row_sum
    if sinks_ptr is not None:
        # A sink has no value: it only takes a share of the row's attention away from the keys. If it takes all of it,
        # the exponential overflows to infinity, and the row becomes zero.
        total += tl.exp2(tl.load(sinks_ptr + i_h).to(tl.float32) * LOG2_E - row_max)
    b_o = acc / total[:, None]
    p_o = out_ptr + rows[:, None] * stride_ot + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(p_o, b_o.to(out_ptr.dtype.element_ty), mask=in_chunk[:, None])
    tl.store(lse_ptr + rows, (row_max + tl.log2(row_sum)) / LOG2_E, mask=in_chunk)


@triton.jit(do_not_specialize=PLAIN, do_not_specialize_on_alignment=ANYWHERE)
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, out_ptr, lse_ptr, kept_ptr,
    bands_ptr, bands_indptr_ptr, band_halves_ptr, columns_ptr, columns_indptr_ptr,
    q_scale_ptr, stride_q_scale, k_scale_ptr, stride_k_scale, v_scale_ptr, stride_v_scale, sinks_ptr,
    num_rows, context_len, table_row, scale_log2,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_kp, stride_kh, stride_kt, stride_table, stride_lse,
    stride_bands, stride_bands_kind, stride_bands_indptr, stride_bands_indptr_kind, stride_band_halves,
    stride_columns, stride_columns_indptr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr, BAND: tl.constexpr, BLOCK_N: tl.constexpr, LOG2_E: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = TILE // 2
    BANDS_PER_STEP: tl.constexpr = BLOCK_N // BAND
    seq_len = context_len + num_rows
    first_tile = context_len // TILE
    num_tiles = tl.cdiv(seq_len, TILE) - first_tile
    # Neighbouring programs are the heads of one KV group, then neighbouring tiles: they share keys in L2. The longest
    # tiles come first, so that the short ones fill the tail.
    i_g = tl.program_id(0) % GROUP
    i_t = first_tile + num_tiles - 1 - (tl.program_id(0) // GROUP) % num_tiles
    i_kv = (tl.program_id(0) // GROUP) // num_tiles
    i_h = i_kv * GROUP + i_g
    start_m = i_t * TILE

    k_ptr += i_kv.to(tl.int64) * stride_kh
    v_ptr += i_kv.to(tl.int64) * stride_kh
    table_ptr += table_row.to(tl.int64) * stride_table
    scale_log2 = scaled_scores(scale_log2, q_scale_ptr, stride_q_scale, k_scale_ptr, stride_k_scale, i_kv)
    bands_ptr += i_h * stride_bands
    bands_indptr_ptr += i_h * stride_bands_indptr + i_t
    band_halves_words = band_halves_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    columns_ptr += i_h * stride_columns
    columns_indptr_ptr += i_h * stride_columns_indptr

    o_m = start_m + tl.arange(0, TILE)
    o_n = tl.arange(0, BLOCK_N)
    in_chunk = (o_m >= context_len) & (o_m < seq_len)
    rows = (o_m - context_len).to(tl.int64)
    b_q, acc, row_max, row_sum = _attend_to_own_tile(
        q_ptr + i_h * stride_qh, rows, in_chunk, o_m, start_m, seq_len, scale_log2,
        k_ptr, v_ptr, table_ptr, stride_qt, stride_kp, stride_kt, HEAD_DIM, PAGE_SIZE, TILE, BLOCK_N, UPCAST,
    )  # fmt: skip

    # Bands that both halves see, only the first, only the second.
    num_shared = tl.load(bands_indptr_ptr)
    num_first = tl.load(bands_indptr_ptr + stride_bands_indptr_kind)
    num_second = tl.load(bands_indptr_ptr + 2 * stride_bands_indptr_kind)
    unmasked_bands = num_shared // BANDS_PER_STEP * BANDS_PER_STEP
    for start in range(0, unmasked_bands, BANDS_PER_STEP):
        offsets = tl.load(bands_ptr + start + o_n // BAND)
        keys = start_m - offsets * BAND + o_n % BAND
        acc, row_max, row_sum = _attend_to(
            b_q, acc, row_max, row_sum, keys, keys >= 0, keys[None, :] >= 0, scale_log2,
            k_ptr, v_ptr, table_ptr, stride_kp, stride_kt, HEAD_DIM, PAGE_SIZE, False, UPCAST,
        )  # fmt: skip

    # A bit for each half, as in band_halves.
    # [TILE]
    row_half = tl.where(o_m - start_m < HALF, 1, 2)
    num_bands = num_shared + num_first + num_second
    for start in range(unmasked_bands, num_bands, BANDS_PER_STEP):
        # [BLOCK_N], the three lists as one
        entry = start + o_n // BAND
        shared = entry < num_shared
        first = entry < num_shared + num_first
        halves = tl.where(shared, 3, tl.where(first, 1, tl.where(entry < num_bands, 2, 0)))
        kind = tl.where(shared, 0, tl.where(first, 1, 2))
        before = tl.where(shared, 0, tl.where(first, num_shared, num_shared + num_first))
        offsets = tl.load(bands_ptr + kind * stride_bands_kind + entry - before, mask=halves > 0, other=0)
        keys = start_m - offsets * BAND + o_n % BAND
        acc, row_max, row_sum = _attend_to(
            b_q, acc, row_max, row_sum, keys, halves > 0, (row_half[:, None] & halves[None, :]) != 0, scale_log2,
            k_ptr, v_ptr, table_ptr, stride_kp, stride_kt, HEAD_DIM, PAGE_SIZE, True, UPCAST,
        )  # fmt: skip

    num_columns = tl.load(columns_indptr_ptr + i_t)
    first_columns = tl.zeros([BLOCK_N], tl.int32)
    second_columns = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, num_columns, BLOCK_N):
        listed = start + o_n < num_columns
        keys = tl.load(columns_ptr + start + o_n, mask=listed, other=0)
        # The halves that have not seen this column in a band. The byte is taken out of a loaded word: with a byte load,
        # Triton would lay out the operands that the byte masks for 8-bit products, and hold Q twice.
        place = i_h * stride_band_halves + i_t * (TILE // BAND) - keys // BAND
        word = tl.load(band_halves_words + (place >> 2), mask=listed, other=-1)
        halves = ~(word >> ((place & 3) * 8)) & 3
        first_columns += halves & 1
        second_columns += halves >> 1
        acc, row_max, row_sum = _attend_to(
            b_q, acc, row_max, row_sum, keys, listed, (row_half[:, None] & halves[None, :]) != 0, scale_log2,
            k_ptr, v_ptr, table_ptr, stride_kp, stride_kt, HEAD_DIM, PAGE_SIZE, True, UPCAST,
        )  # fmt: skip

    acc = scaled(acc, v_scale_ptr, stride_v_scale, i_kv)
    _store_rows(
        out_ptr + i_h * stride_oh, lse_ptr + i_h.to(tl.int64) * stride_lse, sinks_ptr, i_h,
        acc, row_max, row_sum, rows, in_chunk, stride_ot, HEAD_DIM, LOG2_E,
    )  # fmt: skip
    first_keys = (num_shared + num_first) * BAND + tl.sum(first_columns, 0)
    second_keys = (num_shared + num_second) * BAND + tl.sum(second_columns, 0)
    before_tile = tl.where(row_half == 1, first_keys, second_keys)
    kept = tl.sum(tl.where(in_chunk, before_tile + o_m - start_m + 1, 0), 0)
    tl.atomic_add(kept_ptr, kept.to(tl.int64), sem="relaxed")


def attend(chunk: Chunk, index: BandIndex, buffers: AttendBuffers) -> None:
    """See minference_vllm.reference.attend."""
    q, out, kv = chunk.q, chunk.out, chunk.kv
    block_n, num_warps, num_stages = _launch_shape(chunk.head_dim, q.device)
    on_grid(_attend_kernel, (chunk.num_tiles * chunk.num_qo_heads,))(
        q, kv.k, kv.v, kv.block_table, out, buffers.lse, buffers.kept_pairs,
        index.bands, index.bands_indptr, index.band_halves, index.columns, index.columns_indptr,
        *all_scales(chunk), chunk.sinks,
        chunk.num_rows, chunk.context_len, kv.row, chunk.scale * LOG2_E,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), *kv_strides(kv), kv.block_table.stride(0),
        buffers.lse.stride(0), index.bands.stride(0), index.bands.stride(1),
        index.bands_indptr.stride(0), index.bands_indptr.stride(1), index.band_halves.stride(0),
        index.columns.stride(0), index.columns_indptr.stride(0),
        GROUP=chunk.group_size, HEAD_DIM=chunk.head_dim, PAGE_SIZE=kv.page_size,
        TILE=TILE, BAND=BAND, BLOCK_N=block_n, LOG2_E=LOG2_E,
        UPCAST=not q.is_cuda,  # the interpreter's dot is wrong for bf16
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


@functools.cache
def _launch_shape(head_dim: int, device: torch.device) -> tuple[int, int, int]:
    """BLOCK_N, warps and pipeline stages that fit the shared memory of any GPU of compute capability 8.0 and more."""
    if head_dim == 256 and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined] # torch's stubs lack it
        # The wide shape takes 145 KiB, and GPUs for workstations have 99.
        return (64, 8, 2) if shared >= 160 * 1024 else (32, 8, 1)
    return {64: (128, 8, 3), 128: (128, 8, 2), 256: (64, 8, 2)}[head_dim]
