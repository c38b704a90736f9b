# SPDX-License-Identifier: Apache-2.0
"""What is made of sampled rows and means of keys on Hopper, csrc/score.cu: bf16 and fp16, head_dim 64 and 128."""

import ctypes

import torch

from minference_vllm.chunk import Chunk
from minference_vllm.index import GROUP, HALF, HALVES, TILE
from minference_vllm.kernels.cuda import library
from minference_vllm.kernels.triton.launch import LOG2_E
from minference_vllm.reference.normalisers import PART
from minference_vllm.scratch import CODES_PER_OCTAVE, MASS_CODES, MEAN, OCTAVES_BELOW_ONE

ROWS_PER_HALF = (16, 32, 64)
"""Rows of a half that the kernels can take: one, two or four parts."""
# csrc/score.cuh and csrc/score_mass.cuh hold the same numbers.
assert (TILE, HALF, PART, GROUP, MEAN) == (128, 64, 16, 16, 4)
assert (MASS_CODES, CODES_PER_OCTAVE, OCTAVES_BELOW_ONE) == (256, 8, 28)

POINTERS = ("q", "means", "row_lse", "masses", "partial_sum")
STRIDES = ("q_row", "q_head", "means", "lse", "masses", "masses_part")
SIZES = (
    "num_rows", "context_len", "rows_per_half", "num_qo_heads", "num_kv_heads", "head_dim", "is_bf16",
    "first_head", "num_heads", "max_ranges", "num_multiprocessors",
)  # fmt: skip


class _Arguments(ctypes.Structure):
    """Mirrors MInferenceScore in csrc/score.cu."""

    _fields_ = library.arguments_of(POINTERS, STRIDES, SIZES)


def supports(chunk: Chunk, rows_per_half: int) -> bool:
    """Whether the kernels are made for this head size and type, this many rows, and queries that lie like these."""
    q = chunk.q
    return rows_per_half in ROWS_PER_HALF and library.takes(q, (q,), (q.stride(0), q.stride(1)))


def group_masses(
    chunk: Chunk, means: torch.Tensor, row_lse: torch.Tensor, first_head: int, masses: torch.Tensor
) -> None:
    """See minference_vllm.reference.group_masses. The last two dimensions of `means` and `row_lse` are contiguous.

    Nothing is written but the codes of the groups before each part's tile.
    """
    num_heads = min(len(masses), chunk.num_qo_heads - first_head)
    arguments = _describe(chunk, means, row_lse)
    arguments.masses = masses.data_ptr()
    arguments.stride_masses, arguments.stride_masses_part = masses.stride(0), masses.stride(1)
    arguments.first_head, arguments.num_heads = first_head, num_heads
    library.launch("minference_group_masses", arguments, chunk.q.device)


def add_means(chunk: Chunk, means: torch.Tensor, row_lse: torch.Tensor, partial_sum: torch.Tensor) -> None:
    """Let normalisers count the means before each row's tile too.

    What minference_vllm.reference.row_normalisers gives without `before` becomes what it gives with it.

    Args:
        chunk, means: as there.
        row_lse: added to. Its last two dimensions, and those of `means`, are contiguous.
        partial_sum: float32 scratch, contiguous, of at least the size of the chunk's part of row_lse. With a few times
            that, a chunk of few rows keeps the whole GPU busy.

    Raises:
        ValueError: partial_sum is too small.
    """
    num_sums = chunk.num_qo_heads * chunk.num_tiles * HALVES * row_lse.shape[2]
    max_ranges = partial_sum.numel() // num_sums
    if not max_ranges:
        raise ValueError(f"partial_sum must hold {num_sums} numbers, got {partial_sum.numel()}")
    arguments = _describe(chunk, means, row_lse)
    arguments.partial_sum = partial_sum.data_ptr()
    arguments.num_heads, arguments.max_ranges = chunk.num_qo_heads, max_ranges
    library.launch("minference_row_lse", arguments, chunk.q.device)


def _describe(chunk: Chunk, means: torch.Tensor, row_lse: torch.Tensor) -> _Arguments:
    """What both kernels read; the rest is zero."""
    q = chunk.q
    return _Arguments(
        q=q.data_ptr(),
        means=means.data_ptr(),
        row_lse=row_lse.data_ptr(),
        stride_q_row=q.stride(0),
        stride_q_head=q.stride(1),
        stride_means=means.stride(0),
        stride_lse=row_lse.stride(0),
        num_rows=chunk.num_rows,
        context_len=chunk.context_len,
        rows_per_half=row_lse.shape[2],
        num_qo_heads=chunk.num_qo_heads,
        num_kv_heads=len(means),
        head_dim=chunk.head_dim,
        is_bf16=q.dtype == torch.bfloat16,
        num_multiprocessors=library.num_multiprocessors(q.device),
        scale_log2=chunk.scale * LOG2_E,
    )
