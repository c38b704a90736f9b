# SPDX-License-Identifier: Apache-2.0
"""Means of consecutive keys: the cache is read once, at memory speed, and fine means once more for coarse ones."""

import torch
import triton
import triton.language as tl

from minference_vllm.chunk import PagedKV
from minference_vllm.kernels.triton.launch import kv_strides, on_grid
from minference_vllm.kernels.triton.operands import from_operand, to_operand
from minference_vllm.scratch import CENTRE_END, CENTRE_START, MEAN

BLOCK_NUMBERS = 4096
"""How many elements of means one program writes."""

_CENTRE_START, _CENTRE_END = tl.constexpr(CENTRE_START), tl.constexpr(CENTRE_END)


@triton.jit(do_not_specialize=["count", "num_kv_heads", "table_row", "stride_table"])
def _means_kernel(
    k_ptr, table_ptr, means_ptr, count, num_kv_heads, table_row,
    stride_kp, stride_kh, stride_kt, stride_table, stride_mh,
    MEAN: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs are the heads of the same keys, which are adjacent in an NHD cache. Heads and keys share one
    # axis of the grid: its second axis is limited to 65,535 programs, and eight million tokens need more.
    i_kv, i_n = tl.program_id(0) % num_kv_heads, tl.program_id(0) // num_kv_heads
    k_ptr += i_kv.to(tl.int64) * stride_kh
    means_ptr += i_kv.to(tl.int64) * stride_mh
    table_ptr += table_row.to(tl.int64) * stride_table
    # [BLOCK]
    o_n = i_n * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, HEAD_DIM)
    inside = o_n < count
    # A mean's keys lie in one page, whose size is a multiple of MEAN.
    pages = tl.load(table_ptr + o_n * MEAN // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    # [BLOCK, HEAD_DIM]
    p_k = k_ptr + (pages * stride_kp + (o_n * MEAN % PAGE_SIZE) * stride_kt)[:, None] + o_d[None, :]
    b_sum = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for i in tl.static_range(MEAN):
        b_sum += tl.load(p_k + i * stride_kt, mask=inside[:, None], other=0.0).to(tl.float32)
    # Every program averages the centre's keys anew. They come from the cache.
    # [keys of the centre]
    o_c = _CENTRE_START + tl.arange(0, _CENTRE_END - _CENTRE_START)
    has_centre = tl.full([_CENTRE_END - _CENTRE_START], _CENTRE_END, tl.int32) <= count * MEAN
    pages = tl.load(table_ptr + o_c // PAGE_SIZE, mask=has_centre, other=0).to(tl.int64)
    # [keys of the centre, HEAD_DIM]
    p_c = k_ptr + (pages * stride_kp + (o_c % PAGE_SIZE) * stride_kt)[:, None] + o_d[None, :]
    b_c = tl.load(p_c, mask=has_centre[:, None], other=0.0).to(tl.float32)
    # [HEAD_DIM]
    b_centre = tl.sum(b_c, 0) / (_CENTRE_END - _CENTRE_START)
    p_means = means_ptr + o_n.to(tl.int64)[:, None] * HEAD_DIM + o_d[None, :]
    b_means = to_operand(b_sum / MEAN - b_centre[None, :], means_ptr, INTERPRETED)
    tl.store(p_means, b_means, mask=inside[:, None])


@triton.jit(do_not_specialize=["count"])
def _coarse_means_kernel(
    means_ptr, coarse_ptr, count, stride_mh, stride_ch,
    EACH: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    i_kv, i_n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    # [BLOCK]
    o_n = i_n * BLOCK + tl.arange(0, BLOCK)
    o_d = tl.arange(0, HEAD_DIM)
    inside = (o_n < count)[:, None]
    # [BLOCK, HEAD_DIM]
    p_means = means_ptr + i_kv * stride_mh + (o_n * EACH).to(tl.int64)[:, None] * HEAD_DIM + o_d[None, :]
    b_sum = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for i in tl.static_range(EACH):
        b_sum += from_operand(tl.load(p_means + i * HEAD_DIM, mask=inside, other=0.0))
    p_coarse = coarse_ptr + i_kv * stride_ch + o_n.to(tl.int64)[:, None] * HEAD_DIM + o_d[None, :]
    tl.store(p_coarse, to_operand(b_sum / EACH, coarse_ptr, INTERPRETED), mask=inside)


def key_means(kv: PagedKV, seq_len: int, means: torch.Tensor) -> None:
    """See minference_vllm.reference.key_means. The last two dimensions of `means` are contiguous."""
    count = seq_len // MEAN
    if not count:
        return
    head_dim = means.shape[2]
    block = BLOCK_NUMBERS // head_dim
    on_grid(_means_kernel, (kv.num_kv_heads * triton.cdiv(count, block),))(
        kv.k, kv.block_table, means, count, kv.num_kv_heads, kv.row,
        *kv_strides(kv), kv.block_table.stride(0), means.stride(0),
        MEAN=MEAN, HEAD_DIM=head_dim, PAGE_SIZE=kv.page_size, BLOCK=block,
        INTERPRETED=not means.is_cuda, num_warps=4,
    )  # fmt: skip


def coarse_means(means: torch.Tensor, seq_len: int, coarse: torch.Tensor, keys: int, coarse_keys: int) -> None:
    """See minference_vllm.reference.coarse_means. The last two dimensions of both are contiguous."""
    count, head_dim = seq_len // coarse_keys, means.shape[2]
    if not count:
        return
    block = BLOCK_NUMBERS // head_dim
    on_grid(_coarse_means_kernel, (len(means), triton.cdiv(count, block)))(
        means, coarse, count, means.stride(0), coarse.stride(0),
        EACH=coarse_keys // keys, HEAD_DIM=head_dim, BLOCK=block,
        INTERPRETED=not means.is_cuda, num_warps=4,
    )  # fmt: skip
