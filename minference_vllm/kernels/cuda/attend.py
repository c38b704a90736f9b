# SPDX-License-Identifier: Apache-2.0
"""The attending kernel for Hopper, csrc/attend.cu: bf16 and fp16, head_dim 64 and 128; the rest runs in Triton's."""

import ctypes

import torch

from minference_vllm.index import PagedKV, SparseIndex
from minference_vllm.kernels.attend import attend as attend_in_triton
from minference_vllm.kernels.cuda import library
from minference_vllm.kernels.launch import LOG2_E, kv_strides

POINTERS = (
    "q", "k", "v", "out", "lse", "kept_pairs", "num_drawn",
    "block_table", "bands", "bands_below", "band_halves", "columns", "columns_below",
)  # fmt: skip
STRIDES = (
    "q_row", "q_head", "out_row", "out_head", "page", "kv_head", "token", "lse",
    "bands", "bands_kind", "below", "below_kind", "halves", "columns", "columns_below",
)  # fmt: skip
SIZES = (
    "num_rows", "context_len", "num_qo_heads", "num_kv_heads", "head_dim", "page_size", "num_pages", "is_bf16",
    "num_programs",
)  # fmt: skip


class _Arguments(ctypes.Structure):
    """Mirrors MInferenceAttend in csrc/attend.cu."""

    _fields_ = library.arguments_of(POINTERS, STRIDES, SIZES)


def supports(q: torch.Tensor, kv: PagedKV, out: torch.Tensor) -> bool:
    """Whether the kernel is made for this head size and type, and for tensors that lie like these."""
    strides = (q.stride(0), q.stride(1), out.stride(0), out.stride(1), *kv_strides(kv))
    return library.takes(q, (q, kv.k, kv.v, out), strides)


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
    if not supports(q, kv, out):
        attend_in_triton(q, kv, context_len, scale, index, out, lse, kept_pairs)
        return
    num_pages, num_kv_heads, page_size, head_dim = kv.k.shape
    page, kv_head, token = kv_strides(kv)
    arguments = _Arguments(
        q.data_ptr(), kv.k.data_ptr(), kv.v.data_ptr(), out.data_ptr(), lse.data_ptr(), kept_pairs.data_ptr(),
        library.counter(q.device).data_ptr(), kv.block_table[kv.row].data_ptr(),
        index.bands.data_ptr(), index.bands_below.data_ptr(), index.band_halves.data_ptr(),
        index.columns.data_ptr(), index.columns_below.data_ptr(),
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), page, kv_head or token, token, lse.stride(0),
        index.bands.stride(0), index.bands.stride(1), index.bands_below.stride(0), index.bands_below.stride(1),
        index.band_halves.stride(0), index.columns.stride(0), index.columns_below.stride(0),
        len(q), context_len, q.shape[1], num_kv_heads, head_dim, page_size, num_pages, q.dtype == torch.bfloat16,
        library.num_multiprocessors(q.device),  # the kernel is persistent
        scale * LOG2_E,
    )  # fmt: skip
    library.launch("minference_attend", arguments, q.device)
