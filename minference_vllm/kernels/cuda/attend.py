# SPDX-License-Identifier: Apache-2.0
"""The attention kernel for Hopper, csrc/attend.cu: bf16, fp16 and FP8, head_dim 64 and 128."""

import ctypes

import torch

from minference_vllm.chunk import FP8, Chunk
from minference_vllm.index import AnyIndex, BandIndex, HeadIndex, TileIndex
from minference_vllm.kernels.cuda import library
from minference_vllm.kernels.triton.launch import LOG2_E, kv_strides
from minference_vllm.scratch import AttendBuffers


class _Chunk(ctypes.Structure):
    """Mirrors MInferenceAttendChunk in csrc/attend.cu."""

    _fields_ = library.arguments_of(
        (
            "q", "k", "v", "out", "lse", "kept_pairs", "tile_counter", "block_table", "sinks",
            "q_scale", "k_scale", "v_scale",
        ),
        (
            "q_row", "q_head", "out_row", "out_head", "page", "kv_head", "token", "lse",
            "q_scale", "k_scale", "v_scale",
        ),
        (
            "num_rows", "context_len", "num_qo_heads", "num_kv_heads", "head_dim", "page_size", "num_pages", "is_bf16",
            "is_fp8", "num_programs", "sinks_are_fp32",
        ),
    )  # fmt: skip


class _Bands(ctypes.Structure):
    """Mirrors MInferenceAttendBands in csrc/attend.cu."""

    _fields_ = [
        ("chunk", _Chunk),
        *library.pointers_of("bands", "bands_indptr", "band_halves", "columns", "columns_indptr"),
        *library.strides_of(
            "bands", "bands_kind", "bands_indptr", "bands_indptr_kind", "band_halves", "columns", "columns_indptr"
        ),
    ]


class _Tiles(ctypes.Structure):
    """Mirrors MInferenceAttendTiles in csrc/attend.cu."""

    _fields_ = [
        ("chunk", _Chunk),
        *library.pointers_of("groups", "counts"),
        *library.strides_of("groups", "groups_tile", "counts", "counts_tile"),
        *library.sizes_of("long_tiles"),
    ]


class _Heads(ctypes.Structure):
    """Mirrors MInferenceAttendHeads in csrc/attend.cu."""

    _fields_ = [("chunk", _Chunk), *library.pointers_of("heads", "num_heads")]


def supports(chunk: Chunk) -> bool:
    """Whether the kernel supports this head_dim, these dtypes, and the strides and alignment of these tensors."""
    q, out, kv = chunk.q, chunk.out, chunk.kv
    stored = library.is_aligned((q, kv.k, kv.v), (q.stride(0), q.stride(1), *kv_strides(kv)))
    written = library.is_aligned((out,), out.stride()[:2])
    reads_sinks = chunk.sinks is None or chunk.sinks.dtype in (torch.float32, out.dtype)
    is_made = kv.k.dtype == q.dtype and library.is_made_for(chunk.head_dim, out.dtype)
    return is_made and stored and written and reads_sinks


def attend(chunk: Chunk, index: AnyIndex, buffers: AttendBuffers) -> None:
    """See minference_vllm.reference.attend."""
    device, described = chunk.q.device, _describe(chunk, buffers)
    if isinstance(index, BandIndex):
        library.launch("minference_attend_bands", _Bands(described, *_describe_bands(index)), device)
    elif isinstance(index, HeadIndex):
        heads = _Heads(described, index.heads.data_ptr(), index.num_heads.data_ptr())
        library.launch("minference_attend_heads", heads, device)
    else:
        library.launch("minference_attend_tiles", _Tiles(described, *_describe_tiles(index)), device)


def _describe(chunk: Chunk, buffers: AttendBuffers) -> _Chunk:
    q, out, kv, lse, sinks = chunk.q, chunk.out, chunk.kv, buffers.lse, chunk.sinks
    num_pages, num_kv_heads, page_size, head_dim = kv.k.shape
    page, kv_head, token = kv_strides(kv)
    scales = chunk.q_scale, kv.k_scale, kv.v_scale
    return _Chunk(
        q.data_ptr(), kv.k.data_ptr(), kv.v.data_ptr(), out.data_ptr(), lse.data_ptr(), buffers.kept_pairs.data_ptr(),
        buffers.tile_counter.data_ptr(), kv.block_table[kv.row].data_ptr(),
        *(0 if tensor is None else tensor.data_ptr() for tensor in (sinks, *scales)),
        q.stride(0), q.stride(1), out.stride(0), out.stride(1), page, kv_head or token, token, lse.stride(0),
        *(0 if scale is None else scale.stride(0) for scale in scales),
        chunk.num_rows, chunk.context_len, chunk.num_qo_heads, num_kv_heads, head_dim, page_size, num_pages,
        out.dtype == torch.bfloat16, q.dtype == FP8,
        library.num_multiprocessors(q.device),  # the kernel is persistent
        sinks is not None and sinks.dtype == torch.float32,
        chunk.scale * LOG2_E,
    )  # fmt: skip


def _describe_bands(index: BandIndex) -> tuple[int, ...]:
    return (
        index.bands.data_ptr(), index.bands_indptr.data_ptr(), index.band_halves.data_ptr(),
        index.columns.data_ptr(), index.columns_indptr.data_ptr(),
        index.bands.stride(0), index.bands.stride(1), index.bands_indptr.stride(0), index.bands_indptr.stride(1),
        index.band_halves.stride(0), index.columns.stride(0), index.columns_indptr.stride(0),
    )  # fmt: skip


def _describe_tiles(index: TileIndex) -> tuple[int, ...]:
    return (
        index.groups.data_ptr(), index.counts.data_ptr(),
        index.groups.stride(0), index.groups.stride(1), index.counts.stride(0), index.counts.stride(1),
        index.long_tiles,
    )  # fmt: skip
