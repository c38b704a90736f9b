# SPDX-License-Identifier: Apache-2.0
"""The probe for Hopper, csrc/probe.cu: bf16 and fp16, head_dim 64 and 128; the rest runs in Triton's."""

import ctypes

import torch

from minference_vllm.index import PagedKV
from minference_vllm.kernels.cuda import library
from minference_vllm.kernels.launch import LOG2_E, kv_strides
from minference_vllm.kernels.probe import probe as probe_in_triton
from minference_vllm.workspace import MASS_UNIT, Workspace

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


def supports(q: torch.Tensor, kv: PagedKV) -> bool:
    """Whether the kernel is made for this head size and type, and for tensors that lie like these."""
    strides = (q.stride(0), q.stride(1), *kv_strides(kv))
    return library.takes(q, (q, kv.k), strides)


def probe(
    q: torch.Tensor, kv: PagedKV, context_len: int, scale: float, num_last: int, num_spread: int, ws: Workspace
) -> None:
    """See minference_vllm.reference.probe. What the kernel is not made for runs in Triton's."""
    if not supports(q, kv) or not {num_last, num_spread} <= {0, GROUP}:
        probe_in_triton(q, kv, context_len, scale, num_last, num_spread, ws)
        return
    if num_last:
        _probe_group(q, kv, context_len, scale, ws, before=0, spread=False)
    if num_spread:
        _probe_group(q, kv, context_len, scale, ws, before=num_last, spread=True)


def _probe_group(
    q: torch.Tensor, kv: PagedKV, context_len: int, scale: float, ws: Workspace, before: int, spread: bool
) -> None:
    """Add one group of probe rows; `before` of them came earlier."""
    num_rows, num_qo_heads, head_dim = q.shape
    num_pages, num_kv_heads, page_size, _ = kv.k.shape
    page, kv_head, token = kv_strides(kv)
    arguments = _Arguments(
        q.data_ptr(), kv.k.data_ptr(), kv.block_table[kv.row].data_ptr(),
        ws.probe_max.data_ptr(), ws.probe_sum.data_ptr(), ws.probe_lse[:, before:].data_ptr(),
        ws.vertical.data_ptr(), ws.slash.data_ptr(),
        q.stride(0), q.stride(1), page, kv_head or token, token, ws.probe_lse.stride(0), ws.vertical.stride(0),
        num_rows, context_len, num_qo_heads, num_kv_heads, head_dim, page_size, num_pages, q.dtype == torch.bfloat16,
        ws.probe_max.numel() // (num_qo_heads * GROUP), library.num_multiprocessors(q.device), spread, before > 0,
        scale * LOG2_E,
    )  # fmt: skip
    library.launch("minference_probe", arguments, q.device)
