# SPDX-License-Identifier: Apache-2.0
"""The attending kernel for Hopper (sm_90a), in Gluon: warp-specialised, wgmma, keys gathered by cp.async.

One producer warpgroup walks the tile's stream of kept keys, 128 a stage, and copies the K and V rows from the pages
into a ring in shared memory; two consumer warpgroups hold 64 query rows each and run the scores of one stage over the
values of the stage before. Stages come in three sorts: the tile's own keys (causal), whole bands (no mask), and a rest
of bands and the columns, where the producer sends a bias of 0 or -inf a key along. A masked slot reads a key that
exists, so no garbage ever enters a product.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from minference_vllm.index import BAND, TILE, PagedKV, SparseIndex
from minference_vllm.kernels.strides import kv_strides

LOG2_E = 1.4426950408889634
SUPPORTED_HEAD_DIMS = (64, 128)
CONSUMER_REGISTERS = gl.constexpr(216)
# 12 warps share 64K registers; what the consumers leave goes to the producer.
REGISTERS_AT_LAUNCH = 168


@gluon.jit
def _slots(keys, last_key, table_ptr, stride_kp, stride_kt, PAGE_SIZE: gl.constexpr):
    """Element offsets of keys in the cache, 64-bit; keys past the request's end stand for its last one."""
    keys = gl.minimum(keys, last_key)
    pages = gl.load(table_ptr + keys // PAGE_SIZE)
    return pages.to(gl.int64) * stride_kp + (keys % PAGE_SIZE) * stride_kt


@gluon.jit
def _band_keys(start, num_bands, start_m, bands_ptr, o_n, BAND: gl.constexpr):
    """Keys of the bands listed from `start` on; past the list, keys of the tile itself."""
    listed = start + o_n // BAND
    offsets = gl.load(bands_ptr + listed, mask=listed < num_bands, other=0)
    return start_m - offsets * BAND + o_n % BAND


@gluon.jit
def _single_keys(
    start, rest, num_columns, start_m, bands_ptr, bands_below_ptr, columns_ptr, o_n, BAND: gl.constexpr
):  # fmt: skip
    """Entries from `start` on of the rest of the bands (`rest` keys) and then the columns, and which of them count."""
    entry = start + o_n
    in_band = entry < rest
    listed = entry < rest + num_columns
    offsets = gl.load(bands_ptr + entry // BAND, mask=in_band, other=0)
    columns = gl.load(columns_ptr + entry - rest, mask=listed & (entry >= rest), other=0)
    offset = start_m // BAND - columns // BAND
    below = gl.load(bands_below_ptr + offset, mask=listed, other=0)
    below_next = gl.load(bands_below_ptr + offset + 1, mask=listed, other=0)
    keys = gl.where(in_band, start_m - offsets * BAND + entry % BAND, columns)
    return keys, in_band | (listed & (below == below_next))


@gluon.jit
def _copy_rows(stage, offsets, source_ptr, tiles, full, empty, STAGES: gl.constexpr):
    """Copy a stage's rows into the ring, once the consumers have left their place."""
    slot = stage % STAGES
    mbarrier.wait(empty.index(slot), ((stage // STAGES) & 1) ^ 1)
    async_copy.async_load(tiles.index(slot), source_ptr + offsets)
    async_copy.mbarrier_arrive(full.index(slot), increment_count=False)


@gluon.jit
def _produce(
    k_ptr, v_ptr, table_ptr, bands_ptr, bands_below_ptr, columns_ptr, kept_ptr,
    start_m, first_row, last_key, num_bands, num_columns, stride_kp, stride_kt,
    bias, bias_full, ring,
    HEAD_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr, TILE: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    ks, vs, k_full, k_empty, v_full, v_empty = ring
    LANES: gl.constexpr = HEAD_DIM // 8
    # A key a thread to find the rows; 16 bytes a thread to copy them.
    KEYS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    BANDS_PER_TILE: gl.constexpr = TILE // BAND
    o_n = gl.arange(0, TILE, layout=KEYS)
    o_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ROWS))
    whole = num_bands // BANDS_PER_TILE

    # The rows of a stage are looked up while the stage before waits for its place.
    slots = _slots(start_m + o_n, last_key, table_ptr, stride_kp, stride_kt, PAGE_SIZE)
    for stage in range(whole + 1):
        # [TILE, HEAD_DIM]
        offsets = gl.convert_layout(slots, gl.SliceLayout(1, ROWS))[:, None] + o_d[None, :]
        _copy_rows(stage, offsets, k_ptr, ks, k_full, k_empty, STAGES)
        keys = _band_keys(stage * BANDS_PER_TILE, num_bands, start_m, bands_ptr, o_n, BAND)
        slots = _slots(keys, last_key, table_ptr, stride_kp, stride_kt, PAGE_SIZE)
        _copy_rows(stage, offsets, v_ptr, vs, v_full, v_empty, STAGES)

    bands_ptr += whole * BANDS_PER_TILE
    rest = (num_bands - whole * BANDS_PER_TILE) * BAND
    num_single = gl.cdiv(rest + num_columns, TILE)
    num_kept = gl.zeros([TILE], gl.int32, KEYS)
    keys, fresh = _single_keys(
        0, rest, num_columns, start_m, bands_ptr, bands_below_ptr, columns_ptr, o_n, BAND
    )  # fmt: skip
    slots = _slots(keys, last_key, table_ptr, stride_kp, stride_kt, PAGE_SIZE)
    for i in range(num_single):
        offsets = gl.convert_layout(slots, gl.SliceLayout(1, ROWS))[:, None] + o_d[None, :]
        _copy_rows(whole + 1 + i, offsets, k_ptr, ks, k_full, k_empty, STAGES)
        # The consumers have left this place of the bias too: they read it before they leave that of K.
        bias.index(i % STAGES).store(gl.where(fresh, 0.0, float("-inf")))
        mbarrier.arrive(bias_full.index(i % STAGES), count=1)
        num_kept += fresh.to(gl.int32)
        keys, fresh = _single_keys(
            (i + 1) * TILE, rest, num_columns, start_m, bands_ptr, bands_below_ptr, columns_ptr, o_n, BAND
        )  # fmt: skip
        slots = _slots(keys, last_key, table_ptr, stride_kp, stride_kt, PAGE_SIZE)
        _copy_rows(whole + 1 + i, offsets, v_ptr, vs, v_full, v_empty, STAGES)

    rows = gl.minimum(start_m + TILE, last_key + 1) - first_row
    own = rows * (first_row - start_m) + rows * (rows + 1) // 2
    kept = rows * (whole * TILE + gl.sum(num_kept, 0)) + own
    gl.atomic_add(kept_ptr, kept.to(gl.int64), sem="relaxed")


@gluon.jit
def _softmax(scores, row_max, row_sum, P: gl.constexpr, DTYPE: gl.constexpr):
    """Online softmax of scaled scores (base 2): probabilities as the operand of the next product, and the rescaling."""
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    p = gl.exp2(scores - new_max[:, None])
    rescale = gl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + gl.sum(p, 1)
    return gl.convert_layout(p.to(DTYPE), P), rescale, new_max, row_sum


@gluon.jit
def _consume_stage(
    stage, acc, p, row_max, row_sum, q, scale_log2, bias, bias_full, bias_stage, ring,
    BIASED: gl.constexpr, SCORES: gl.constexpr, OUT: gl.constexpr, P: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Scores of `stage` over the values of the stage before, whose probabilities are `p`."""
    ks, vs, k_full, k_empty, v_full, v_empty = ring
    slot = stage % STAGES
    before = (stage - 1) % STAGES
    mbarrier.wait(k_full.index(slot), (stage // STAGES) & 1)
    fence_async_shared()
    zeros = gl.zeros([64, TILE], gl.float32, SCORES)
    scores = warpgroup_mma(q, ks.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), ((stage - 1) // STAGES) & 1)
    fence_async_shared()
    acc = warpgroup_mma(p, vs.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    scores = scores * scale_log2
    if BIASED:
        mbarrier.wait(bias_full.index(bias_stage % STAGES), (bias_stage // STAGES) & 1)
        scores += bias.index(bias_stage % STAGES).load(gl.SliceLayout(0, SCORES))[None, :]
    mbarrier.arrive(k_empty.index(slot), count=1)
    p, rescale, row_max, row_sum = _softmax(scores, row_max, row_sum, P, DTYPE)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUT))[:, None]
    return acc, p, row_max, row_sum


@gluon.jit
def _consume(
    out_ptr, lse_ptr, start_m, context_len, seq_len, num_bands, num_columns, scale_log2, stride_ot,
    qs, bias, bias_full, ring,
    HEAD_DIM: gl.constexpr, TILE: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr,
    LOG2_E: gl.constexpr, HALF: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    BANDS_PER_TILE: gl.constexpr = TILE // BAND
    ks, vs, k_full, k_empty, v_full, v_empty = ring
    q = qs.index(HALF)
    acc = gl.zeros([64, HEAD_DIM], gl.float32, OUT)
    row_max = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, SCORES))
    row_sum = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))

    mbarrier.wait(k_full.index(0), 0)
    fence_async_shared()
    zeros = gl.zeros([64, TILE], gl.float32, SCORES)
    scores = warpgroup_mma(q, ks.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(k_empty.index(0), count=1)
    row = HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    key = gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
    scores = gl.where(key[None, :] <= row[:, None], scores * scale_log2, float("-inf"))
    p, _, row_max, row_sum = _softmax(scores, row_max, row_sum, P, DTYPE)

    whole = num_bands // BANDS_PER_TILE
    for i in range(whole):
        acc, p, row_max, row_sum = _consume_stage(
            i + 1, acc, p, row_max, row_sum, q, scale_log2, bias, bias_full, 0, ring,
            False, SCORES, OUT, P, TILE, STAGES, DTYPE,
        )  # fmt: skip
    single = gl.cdiv((num_bands - whole * BANDS_PER_TILE) * BAND + num_columns, TILE)
    for i in range(single):
        acc, p, row_max, row_sum = _consume_stage(
            whole + 1 + i, acc, p, row_max, row_sum, q, scale_log2, bias, bias_full, i, ring,
            True, SCORES, OUT, P, TILE, STAGES, DTYPE,
        )  # fmt: skip
    last = whole + single
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    fence_async_shared()
    acc = warpgroup_mma(p, vs.index(last % STAGES), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))

    acc = acc / gl.convert_layout(row_sum, gl.SliceLayout(1, OUT))[:, None]
    o_m = start_m + HALF * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, OUT))
    o_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT))
    in_chunk = (o_m >= context_len) & (o_m < seq_len)
    p_o = out_ptr + (o_m - context_len).to(gl.int64)[:, None] * stride_ot + o_d[None, :]
    gl.store(p_o, acc.to(DTYPE), mask=in_chunk[:, None])
    lse = (row_max + gl.log2(row_sum)) / LOG2_E
    position = start_m + row
    gl.store(lse_ptr + position - context_len, lse, mask=(position >= context_len) & (position < seq_len))


@gluon.jit(do_not_specialize=["num_rows", "context_len", "table_row", "stride_table"])
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, out_ptr, lse_ptr, kept_ptr,
    bands_ptr, bands_below_ptr, columns_ptr, columns_below_ptr,
    num_rows, context_len, table_row, scale_log2,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_kp, stride_kh, stride_kt, stride_table, stride_lse,
    stride_bands, stride_bands_below, stride_columns, stride_columns_below,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr,
    TILE: gl.constexpr, BAND: gl.constexpr, STAGES: gl.constexpr, LOG2_E: gl.constexpr,
):  # fmt: skip
    DTYPE: gl.constexpr = q_ptr.dtype.element_ty
    seq_len = context_len + num_rows
    first_tile = context_len // TILE
    num_tiles = gl.cdiv(seq_len, TILE) - first_tile
    # Neighbouring programs are the heads of one KV group, then neighbouring tiles: they share keys in L2. The longest
    # tiles come first, so that the short ones fill the tail.
    i_g = gl.program_id(0) % GROUP
    i_t = first_tile + num_tiles - 1 - (gl.program_id(0) // GROUP) % num_tiles
    i_kv = (gl.program_id(0) // GROUP) // num_tiles
    i_h = i_kv * GROUP + i_g
    start_m = i_t * TILE

    k_ptr += i_kv * stride_kh
    v_ptr += i_kv * stride_kh
    table_ptr += table_row.to(gl.int64) * stride_table
    bands_ptr += i_h * stride_bands
    bands_below_ptr += i_h * stride_bands_below
    columns_ptr += i_h * stride_columns
    num_bands = gl.load(bands_below_ptr + i_t * (TILE // BAND) + 1)
    num_columns = gl.load(columns_below_ptr + i_h * stride_columns_below + i_t)

    K_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, HEAD_DIM], DTYPE)
    Q_TILE: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, HEAD_DIM], DTYPE)
    BIAS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    qs = gl.allocate_shared_memory(DTYPE, [2, 64, HEAD_DIM], Q_TILE)
    ks = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, HEAD_DIM], K_TILE)
    vs = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, HEAD_DIM], K_TILE)
    bias = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], BIAS)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    bias_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=128)
        mbarrier.init(v_full.index(i), count=128)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_empty.index(i), count=2)
        mbarrier.init(bias_full.index(i), count=1)

    LANES: gl.constexpr = HEAD_DIM // 8
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [4, 1], [1, 0])
    o_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, ROWS))
    for half in gl.static_range(2):
        o_m = start_m + half * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))
        in_chunk = (o_m >= context_len) & (o_m < seq_len)
        p_q = q_ptr + (o_m - context_len).to(gl.int64)[:, None] * stride_qt + i_h * stride_qh + o_d[None, :]
        qs.index(half).store(gl.load(p_q, mask=in_chunk[:, None], other=0.0))
    fence_async_shared()

    ring = (ks, vs, k_full, k_empty, v_full, v_empty)
    out_ptr += i_h * stride_oh
    lse_ptr += i_h * stride_lse
    first_row = gl.maximum(start_m, context_len)
    # Spelled out: a tuple that passes through a name loses its constants.
    gl.warp_specialize(
        [
            (_produce, (k_ptr, v_ptr, table_ptr, bands_ptr, bands_below_ptr, columns_ptr, kept_ptr,
                        start_m, first_row, seq_len - 1, num_bands, num_columns, stride_kp, stride_kt,
                        bias, bias_full, ring, HEAD_DIM, PAGE_SIZE, TILE, BAND, STAGES)),
            (_consume, (out_ptr, lse_ptr, start_m, context_len, seq_len, num_bands, num_columns, scale_log2, stride_ot,
                        qs, bias, bias_full, ring, HEAD_DIM, TILE, BAND, STAGES, LOG2_E, 0)),
            (_consume, (out_ptr, lse_ptr, start_m, context_len, seq_len, num_bands, num_columns, scale_log2, stride_ot,
                        qs, bias, bias_full, ring, HEAD_DIM, TILE, BAND, STAGES, LOG2_E, 1)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS],
    )  # fmt: skip


def supports(q: torch.Tensor) -> bool:
    """Whether these queries' head size fits the registers of this kernel, and their type its matrix units."""
    return q.shape[2] in SUPPORTED_HEAD_DIMS and q.dtype in (torch.bfloat16, torch.float16)


def attend(
    q: torch.Tensor,
    kv: PagedKV,
    context_len: int,
    scale: float,
    index: SparseIndex,
    out: torch.Tensor,
    lse: torch.Tensor,
    kept_pairs: torch.Tensor,
) -> None:
    """See minference_vllm.reference.attend."""
    num_rows, num_qo_heads, head_dim = q.shape
    num_tiles = triton.cdiv(context_len + num_rows, TILE) - context_len // TILE
    _attend_kernel[(num_tiles * num_qo_heads,)](
        q, kv.k, kv.v, kv.block_table, out, lse, kept_pairs,
        index.bands, index.bands_below, index.columns, index.columns_below,
        num_rows, context_len, kv.row, scale * LOG2_E,
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), *kv_strides(kv), kv.block_table.stride(0),
        lse.stride(0), index.bands.stride(0), index.bands_below.stride(0),
        index.columns.stride(0), index.columns_below.stride(0),
        GROUP=num_qo_heads // kv.k.shape[1], HEAD_DIM=head_dim, PAGE_SIZE=kv.page_size,
        TILE=TILE, BAND=BAND, STAGES=2 if head_dim == 128 else 4, LOG2_E=LOG2_E,
        num_warps=4, maxnreg=REGISTERS_AT_LAUNCH,
    )  # fmt: skip
