# SPDX-License-Identifier: Apache-2.0
"""The masses of groups on Hopper, csrc/score.cu: bf16 and fp16, head_dim 64 and 128, and for 128 also in FP8.

Queries may be in FP8 whatever the dtype of the means.
"""

import ctypes

import torch

from minference_vllm.boxes import LISTS, MEANS_PER_GROUP, Boxes
from minference_vllm.chunk import Chunk
from minference_vllm.index import HALF, TILE
from minference_vllm.kernels.cuda import library
from minference_vllm.kernels.triton.launch import LOG2_E
from minference_vllm.reference.masses import CENTRE, OCTAVES, UNIT, squared_for
from minference_vllm.reference.normalisers import PART
from minference_vllm.reference.operands import unit_of_products
from minference_vllm.scratch import CODES_PER_OCTAVE, FP8, FP8_UNIT, MASS_CODES, MEAN, OCTAVES_BELOW_ONE

FP8_HEAD_DIM = 128
"""Scores of smaller heads are as fast in the model's dtype: their exponentials take longer than their products."""

ROWS_PER_HALF = (16, 32, 64)
"""Rows of a half that the kernels can take: one, two or four parts."""
# csrc/score.cuh, csrc/score_weights.cuh and csrc/codes.cuh hold the same numbers.
assert (TILE, HALF, PART, MEANS_PER_GROUP, LISTS) == (128, 64, 16, 4, 16)
assert (MASS_CODES, CODES_PER_OCTAVE, OCTAVES_BELOW_ONE, FP8_UNIT) == (256, 8, 26, 4)
assert (OCTAVES, UNIT, CENTRE) == (20, 32, 0.0573)

POINTERS = ("q", "means", "row_lse", "masses", "boxes", "box_counts", "q_scale", "k_scale")
STRIDES = (
    "q_row", "q_head", "means", "lse", "masses", "masses_part", "boxes_set", "boxes", "box_counts", "q_scale",
    "k_scale",
)  # fmt: skip
SIZES = (
    "num_rows", "context_len", "rows_per_half", "num_qo_heads", "num_kv_heads", "head_dim", "is_bf16",
    "is_fp8", "has_fp8_q", "keys_per_mean", "max_boxes", "num_multiprocessors",
)  # fmt: skip


class _Arguments(ctypes.Structure):
    """Mirrors MInferenceScore in csrc/score.cu."""

    _fields_ = [*library.arguments_of(POINTERS, STRIDES, SIZES), ("squared", ctypes.c_float)]


def is_faster_in_fp8(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernels support means in FP8, for queries of this head_dim in a model of this dtype."""
    return head_dim == FP8_HEAD_DIM and dtype in library.SUPPORTED_DTYPES


def supports(chunk: Chunk, means_dtype: torch.dtype, rows_per_half: int) -> bool:
    """Whether the kernels support this head_dim, these dtypes, this many rows, and these queries' strides.

    They take the scales of a cache in FP8 only together with scales of queries.
    """
    q, dtype = chunk.q, chunk.out.dtype
    takes_means = means_dtype == dtype or (means_dtype == FP8 and is_faster_in_fp8(chunk.head_dim, dtype))
    takes_rows = rows_per_half in ROWS_PER_HALF and library.is_aligned((q,), (q.stride(0), q.stride(1)))
    takes_scales = chunk.is_quantized == (chunk.q_scale is not None)
    return takes_means and takes_rows and takes_scales and library.is_made_for(chunk.head_dim, dtype)


def group_masses(
    chunk: Chunk,
    means: torch.Tensor,
    row_lse: torch.Tensor,
    masses: torch.Tensor,
    mean: int = MEAN,
    boxes: Boxes | None = None,
) -> None:
    """See minference_vllm.reference.group_masses. The last two dimensions of `means` and `row_lse` are contiguous.

    Only the codes of the groups before each part's tile are written.
    """
    q = chunk.q
    arguments = _Arguments(
        q=q.data_ptr(),
        means=means.data_ptr(),
        row_lse=row_lse.data_ptr(),
        masses=masses.data_ptr(),
        stride_q_row=q.stride(0),
        stride_q_head=q.stride(1),
        stride_means=means.stride(0),
        stride_lse=row_lse.stride(0),
        stride_masses=masses.stride(0),
        stride_masses_part=masses.stride(1),
        num_rows=chunk.num_rows,
        context_len=chunk.context_len,
        rows_per_half=row_lse.shape[2],
        num_qo_heads=chunk.num_qo_heads,
        num_kv_heads=chunk.kv.num_kv_heads,
        head_dim=chunk.head_dim,
        is_bf16=chunk.out.dtype == torch.bfloat16,
        is_fp8=means.dtype == FP8,
        has_fp8_q=q.dtype == FP8,
        keys_per_mean=mean,
        num_multiprocessors=library.num_multiprocessors(q.device),
        scale_log2=chunk.scale * LOG2_E * unit_of_products(means),
        squared=squared_for(mean),
        **({} if boxes is None else _of_boxes(boxes)),
        **library.score_scales(chunk),
    )
    library.launch("minference_group_masses", arguments, q.device)


def _of_boxes(boxes: Boxes) -> dict[str, int]:
    """The arguments that describe the boxes."""
    return {
        "boxes": boxes.numbers.data_ptr(),
        "box_counts": boxes.counts.data_ptr(),
        "stride_boxes_set": boxes.numbers.stride(0),
        "stride_boxes": boxes.numbers.stride(1),
        "stride_box_counts": boxes.counts.stride(0),
        "max_boxes": boxes.numbers.shape[2],
    }
