# SPDX-License-Identifier: Apache-2.0
"""The probe for Hopper, csrc/probe.cu: bf16 and fp16, head_dim 64 and 128, and FP8, head_dim 128."""

import ctypes

import torch

from minference_vllm.chunk import FP8, Chunk
from minference_vllm.kernels.cuda import library
from minference_vllm.kernels.triton.launch import LOG2_E, kv_strides
from minference_vllm.scratch import HELD_OUT_ROWS, MASS_UNIT, ProbeBuffers, RecallBuffers

GROUP = 64
"""Rows that one call probes."""
assert HELD_OUT_ROWS == GROUP
assert MASS_UNIT == 2.0**-23  # the kernel reads masses off the bits of 1 + p

LAST, SPREAD, HELD_OUT = range(3)
"""Which rows: see probe::Which in csrc/probe.cuh."""

POINTERS = ("q", "k", "block_table", "q_scale", "k_scale", "partial_max", "partial_sum", "lse", "vertical", "slash")
STRIDES = ("q_row", "q_head", "page", "kv_head", "token", "lse", "mass", "q_scale", "k_scale")
SIZES = (
    "num_rows", "context_len", "num_qo_heads", "num_kv_heads", "head_dim", "page_size", "num_pages", "is_bf16",
    "is_fp8", "max_splits", "num_multiprocessors", "which", "accumulate", "splits",
)  # fmt: skip


class _Arguments(ctypes.Structure):
    """Mirrors MInferenceProbe in csrc/probe.cu."""

    _fields_ = library.arguments_of(POINTERS, STRIDES, SIZES)


def supports(chunk: Chunk, num_last: int, num_spread: int) -> bool:
    """Whether the kernel supports this head_dim, these dtypes, this many rows, and these tensors' strides."""
    return {num_last, num_spread} <= {0, GROUP} and supports_held_out(chunk)


def supports_held_out(chunk: Chunk) -> bool:
    """Whether the first pass supports this head_dim, these dtypes, and the strides of these tensors."""
    q, k = chunk.q, chunk.kv.k
    is_long = q.dtype != FP8 or chunk.head_dim == library.FP8_PROBE_HEAD_DIM
    is_made = is_long and library.is_made_for(chunk.head_dim, chunk.out.dtype)
    return is_made and k.dtype == q.dtype and library.is_aligned((q, k), (*q.stride()[:2], *kv_strides(chunk.kv)))


def probe(chunk: Chunk, num_last: int, num_spread: int, buffers: ProbeBuffers) -> None:
    """See minference_vllm.reference.probe."""
    if num_last:
        _probe_group(chunk, buffers, 0, LAST)
    if num_spread:
        _probe_group(chunk, buffers, num_last, SPREAD)


def held_out_sums(chunk: Chunk, buffers: RecallBuffers) -> int:
    """Compute partial softmaxes of the held-out rows, see reference.recall, over ranges of keys; return how many."""
    arguments = _describe(chunk, buffers, HELD_OUT)
    library.launch("minference_probe_sums", arguments, chunk.q.device)
    return int(arguments.splits)


def _probe_group(chunk: Chunk, buffers: ProbeBuffers, before: int, which: int) -> None:
    """Add the masses of one group of probe rows; `before` rows came before it."""
    arguments = _describe(chunk, buffers, which)
    arguments.lse = buffers.lse[:, before:].data_ptr()
    arguments.vertical, arguments.slash = buffers.vertical.data_ptr(), buffers.slash.data_ptr()
    arguments.stride_lse, arguments.stride_mass = buffers.lse.stride(0), buffers.vertical.stride(0)
    arguments.accumulate = before > 0
    library.launch("minference_probe", arguments, chunk.q.device)


def _describe(chunk: Chunk, buffers: ProbeBuffers | RecallBuffers, which: int) -> _Arguments:
    """The arguments of the first pass; all others are zero."""
    q, kv = chunk.q, chunk.kv
    num_pages, num_kv_heads, page_size, head_dim = kv.k.shape
    page, kv_head, token = kv_strides(kv)
    return _Arguments(
        q=q.data_ptr(),
        k=kv.k.data_ptr(),
        block_table=kv.block_table[kv.row].data_ptr(),
        partial_max=buffers.partial_max.data_ptr(),
        partial_sum=buffers.partial_sum.data_ptr(),
        stride_q_row=q.stride(0),
        stride_q_head=q.stride(1),
        stride_page=page,
        stride_kv_head=kv_head or token,
        stride_token=token,
        num_rows=chunk.num_rows,
        context_len=chunk.context_len,
        num_qo_heads=chunk.num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        num_pages=num_pages,
        is_bf16=chunk.out.dtype == torch.bfloat16,
        is_fp8=q.dtype == FP8,
        max_splits=buffers.partial_max.numel() // (chunk.num_qo_heads * GROUP),
        num_multiprocessors=library.num_multiprocessors(q.device),
        which=which,
        scale_log2=chunk.scale * LOG2_E,
        **library.score_scales(chunk),
    )
