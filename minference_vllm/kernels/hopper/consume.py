# SPDX-License-Identifier: Apache-2.0
"""A consumer warpgroup: online softmax attention of 64 query rows over the stages of the ring."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)


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
def consume(
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
