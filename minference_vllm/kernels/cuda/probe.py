# SPDX-License-Identifier: Apache-2.0
"""The probe for Hopper, csrc/probe.cu: bf16 and fp16, head_dim 64 and 128."""

import ctypes

import torch

from minference_vllm.chunk import Chunk
from minference_vllm.kernels.cuda import library
from minference_vllm.kernels.triton.launch import LOG2_E, kv_strides
from minference_vllm.scratch import MASS_UNIT, ProbeBuffers

GROUP = 64
"""Rows that one call probes."""
assert MASS_UNIT == 2.0**-23  # the kernel reads masses off the bits of 1 + p

POINTERS = ("q", "k", "block_table", "partial_max", "partial_sum", "lse", "vertical", "slash")
STRIDES = ("q_row", "q_head", "page", "kv_head", "token", "lse", "mass")
SIZES = (
    "num_rows", "context_len", "num_qo_heads", "num_kv_heads", "head_dim", "page_size", "num_pages", "is_bf16",
    "max_splits", "num_multiprocessors", "spread", "accumulate",
)  # fmt: skip


class _Arguments(ctypes.Structure):
    """Mirrors MInferenceProbe in csrc/probe.cu."""

    _fields_ = library.arguments_of(POINTERS, STRIDES, SIZES)


def supports(chunk: Chunk, num_last: int, num_spread: int) -> bool:
    """Whether the kernel is made for this head size and type, this many rows, and tensors that lie like these."""
    strides = (chunk.q.stride(0), chunk.q.stride(1), *kv_strides(chunk.kv))
    return {num_last, num_spread} <= {0, GROUP} and library.takes(chunk.q, (chunk.q, chunk.kv.k), strides)


def probe(chunk: Chunk, num_last: int, num_spread: int, buffers: ProbeBuffers) -> None:
    """See minference_vllm.reference.probe."""
    if num_last:
        _probe_group(chunk, buffers, before=0, spread=False)
    if num_spread:
        _probe_group(chunk, buffers, before=num_last, spread=True)


def _probe_group(chunk: Chunk, buffers: ProbeBuffers, before: int, spread: bool) -> None:
    """Add one group of probe rows; `before` of them came earlier."""
    q, kv, num_qo_heads = chunk.q, chunk.kv, chunk.num_qo_heads
    num_pages, num_kv_heads, page_size, head_dim = kv.k.shape
    page, kv_head, token = kv_strides(kv)
    arguments = _Arguments(
        q.data_ptr(), kv.k.data_ptr(), kv.block_table[kv.row].data_ptr(),
        buffers.partial_max.data_ptr(), buffers.partial_sum.data_ptr(), buffers.lse[:, before:].data_ptr(),
        buffers.vertical.data_ptr(), buffers.slash.data_ptr(),
        q.stride(0), q.stride(1), page, kv_head or token, token, buffers.lse.stride(0), buffers.vertical.stride(0),
        chunk.num_rows, chunk.context_len, num_qo_heads, num_kv_heads, head_dim, page_size, num_pages,
        q.dtype == torch.bfloat16,
        buffers.partial_max.numel() // (num_qo_heads * GROUP), library.num_multiprocessors(q.device), spread,
        before > 0, chunk.scale * LOG2_E,
    )  # fmt: skip
    library.launch("minference_probe", arguments, q.device)
