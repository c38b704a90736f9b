# SPDX-License-Identifier: Apache-2.0
"""The groups that tiles keep, on Hopper, csrc/select.cu: where both halves of a tile choose together."""

import ctypes

import torch

from minference_vllm.boxes import Boxes
from minference_vllm.chunk import Chunk
from minference_vllm.index import EVERY_GROUP, GROUP, GROUPS_PER_TILE, HALF, HALVES, TILE, TileIndex
from minference_vllm.kernels.cuda import library
from minference_vllm.reference.groups import ROW
from minference_vllm.reference.normalisers import NORMALISER_KEYS, PART
from minference_vllm.scratch import CODES_PER_OCTAVE, MASS_CODES, OCTAVES_BELOW_ONE

# csrc/select.cuh and csrc/codes.cuh hold the same numbers.
assert (TILE, HALF, GROUPS_PER_TILE, EVERY_GROUP) == (128, 64, 8, -1)
assert (MASS_CODES, CODES_PER_OCTAVE, OCTAVES_BELOW_ONE) == (256, 8, 26)


class _Arguments(ctypes.Structure):
    """Mirrors MInferenceSelect in csrc/select.cu."""

    _fields_ = [
        *library.pointers_of("masses", "left_out", "share", "groups", "counts"),
        *library.strides_of("masses", "masses_part", "left_out", "groups", "groups_tile", "counts"),
        ("rows_weight", ctypes.c_int64),
        *(
            (name, ctypes.c_int32)
            for name in (
                "num_rows", "context_len", "num_qo_heads", "parts", "sink_groups", "local_groups", "first_counted",
                "max_kept",
            )
        ),
    ]  # fmt: skip


def supports(masses: torch.Tensor, by_tile: bool) -> bool:
    """Whether the kernel is made for lists of whole tiles or of halves, and for masses that lie like these."""
    return by_tile and masses.stride(2) == 1 and library.is_aligned((masses,), masses.stride()[:2])


def select_groups(
    masses: torch.Tensor,
    chunk: Chunk,
    share: torch.Tensor,
    rows_per_half: int,
    sink_groups: int,
    local_groups: int,
    by_tile: bool,
    index: TileIndex,
    boxes: Boxes | None = None,
) -> None:
    """See minference_vllm.reference.select_groups. `share` and the last dimension of the others are contiguous.

    Rows of `masses` are read in pieces of 16, so they hold a multiple of that.
    """
    groups, counts = index.groups, index.counts
    arguments = _Arguments(
        masses=masses.data_ptr(),
        left_out=None if boxes is None else boxes.left_out.data_ptr(),
        share=share.data_ptr(),
        groups=groups.data_ptr(),
        counts=counts.data_ptr(),
        stride_masses=masses.stride(0),
        stride_masses_part=masses.stride(1),
        stride_left_out=0 if boxes is None else boxes.left_out.stride(0),
        stride_groups=groups.stride(0),
        stride_groups_tile=groups.stride(1),
        stride_counts=counts.stride(0),
        rows_weight=HALVES * rows_per_half * ROW,
        num_rows=chunk.num_rows,
        context_len=chunk.context_len,
        num_qo_heads=chunk.num_qo_heads,
        parts=rows_per_half // PART,
        sink_groups=sink_groups,
        local_groups=local_groups,
        first_counted=NORMALISER_KEYS // GROUP,
        max_kept=groups.shape[2],
    )
    library.launch("minference_select_groups", arguments, masses.device)
