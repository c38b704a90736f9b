# SPDX-License-Identifier: Apache-2.0
"""The attending kernel for Hopper (sm_90a), in Gluon: warp-specialised, wgmma, keys gathered by cp.async.

One producer warpgroup walks the tile's stream of kept keys, 128 a stage, and copies the K and V rows from the pages
into a ring in shared memory; two consumer warpgroups hold 64 query rows each and run the scores of one stage over the
values of the stage before. Stages come in three sorts: the tile's own keys (causal), whole bands (no mask), and a rest
of bands and the columns, where the producer sends a bias of 0 or -inf a key along. A masked slot reads a key that
exists, so no garbage ever enters a product.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from minference_vllm.index import PagedKV, SparseIndex
from minference_vllm.kernels.hopper.consume import consume
from minference_vllm.kernels.hopper.produce import produce
from minference_vllm.kernels.launch import attend_arguments, attend_constants, attend_grid

SUPPORTED_HEAD_DIMS = (64, 128)
CONSUMER_REGISTERS = gl.constexpr(216)
# 12 warps share 64K registers; what the consumers leave goes to the producer.
REGISTERS_AT_LAUNCH = 168


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

    k_ptr += i_kv.to(gl.int64) * stride_kh
    v_ptr += i_kv.to(gl.int64) * stride_kh
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
            (produce, (k_ptr, v_ptr, table_ptr, bands_ptr, bands_below_ptr, columns_ptr, kept_ptr,
                       start_m, first_row, seq_len - 1, num_bands, num_columns, stride_kp, stride_kt,
                       bias, bias_full, ring, HEAD_DIM, PAGE_SIZE, TILE, BAND, STAGES)),
            (consume, (out_ptr, lse_ptr, start_m, context_len, seq_len, num_bands, num_columns, scale_log2, stride_ot,
                       qs, bias, bias_full, ring, HEAD_DIM, TILE, BAND, STAGES, LOG2_E, 0)),
            (consume, (out_ptr, lse_ptr, start_m, context_len, seq_len, num_bands, num_columns, scale_log2, stride_ot,
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
    _attend_kernel[attend_grid(q, context_len)](
        *attend_arguments(q, kv, context_len, scale, index, out, lse, kept_pairs),
        **attend_constants(q, kv),
        STAGES=2 if q.shape[2] == 128 else 4,
        num_warps=4,
        maxnreg=REGISTERS_AT_LAUNCH,
    )
