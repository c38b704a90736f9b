# SPDX-License-Identifier: Apache-2.0
"""Selection by masses for Hopper, csrc/select.cu: of boxes, and of groups for tiles whose halves choose together."""

import ctypes

import torch

from minference_vllm.boxes import GROUPS_PER_BOX, LISTS, Boxes
from minference_vllm.chunk import Chunk
from minference_vllm.index import EVERY_GROUP, GROUP, GROUPS_PER_TILE, HALF, HALVES, TILE, TileIndex
from minference_vllm.kernels.cuda import library
from minference_vllm.reference.boxes import FIRST_COUNTED, FORCED, OF_PART, PART_OF_DROPPED
from minference_vllm.reference.groups import ROW
from minference_vllm.reference.normalisers import NORMALISER_KEYS, PART
from minference_vllm.scratch import CODES_PER_OCTAVE, MASS_CODES, OCTAVES_BELOW_ONE

# csrc/select.cuh, csrc/select_boxes.cuh and csrc/codes.cuh hold the same numbers.
assert (TILE, HALF, GROUPS_PER_TILE, EVERY_GROUP) == (128, 64, 8, -1)
assert (LISTS, FIRST_COUNTED, FORCED) == (16, 1, 256)
assert (MASS_CODES, CODES_PER_OCTAVE, OCTAVES_BELOW_ONE) == (256, 8, 26)


CODES_OF_A_BOX = torch.int64
assert CODES_OF_A_BOX.itemsize == GROUPS_PER_BOX


class _Groups(ctypes.Structure):
    """Mirrors MInferenceSelect in csrc/select.cu."""

    _fields_ = [
        *library.pointers_of("masses", "share", "groups", "counts"),
        *library.strides_of("masses", "masses_part", "groups", "groups_tile", "counts"),
        ("rows_weight", ctypes.c_int64),
        *library.sizes_of(
            "num_rows", "context_len", "num_qo_heads", "parts", "sink_groups", "local_groups", "long_groups",
            "first_counted", "max_kept",
        ),
    ]  # fmt: skip


class _Boxes(ctypes.Structure):
    """Mirrors MInferenceSelectBoxes in csrc/select.cu."""

    _fields_ = [
        *library.pointers_of("box_masses", "share", "numbers", "counts", "masses"),
        *library.strides_of(
            "box_masses", "box_masses_part", "numbers", "numbers_block", "counts", "masses", "masses_part"
        ),
        ("part_weight", ctypes.c_int64),
        ("part_of_dropped", ctypes.c_double),
        *library.sizes_of(
            "context_len", "num_tiles", "num_kv_heads", "group_size", "parts_per_tile", "sink_boxes", "local_boxes",
            "max_boxes",
        ),
    ]  # fmt: skip


def supports(masses: torch.Tensor) -> bool:
    """Whether the kernels can read masses with these strides and this alignment."""
    return masses.stride(2) == 1 and library.is_aligned((masses,), masses.stride()[:2])


def select_groups(
    masses: torch.Tensor,
    chunk: Chunk,
    share: torch.Tensor,
    rows_per_half: int,
    sink_groups: int,
    local_groups: int,
    long_groups: int,
    index: TileIndex,
) -> None:
    """See minference_vllm.reference.select_groups, with `by_tile`.

    `share`, the last dimension of the other tensors, and the last two of the counts must be contiguous. Rows of
    `masses` are read 16 codes at a time, so their length must be a multiple of 16.
    """
    groups, counts = index.groups, index.counts
    arguments = _Groups(
        masses=masses.data_ptr(),
        share=share.data_ptr(),
        groups=groups.data_ptr(),
        counts=counts.data_ptr(),
        stride_masses=masses.stride(0),
        stride_masses_part=masses.stride(1),
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
        long_groups=long_groups,
        first_counted=NORMALISER_KEYS // GROUP,
        max_kept=groups.shape[2],
    )
    library.launch("minference_select_groups", arguments, masses.device)


def select_boxes(
    box_masses: torch.Tensor,
    chunk: Chunk,
    share: torch.Tensor,
    rows_per_half: int,
    sink_boxes: int,
    local_boxes: int,
    boxes: Boxes,
    masses: torch.Tensor,
) -> None:
    """See minference_vllm.reference.select_boxes. `share` and the last dimension of the others are contiguous.

    Rows of `box_masses` are read 16 codes at a time, and rows of `masses` written in words of GROUPS_PER_BOX codes.
    """
    words, numbers = masses.view(CODES_OF_A_BOX), boxes.numbers
    arguments = _Boxes(
        box_masses=box_masses.data_ptr(),
        share=share.data_ptr(),
        numbers=numbers.data_ptr(),
        counts=boxes.counts.data_ptr(),
        masses=words.data_ptr(),
        stride_box_masses=box_masses.stride(0),
        stride_box_masses_part=box_masses.stride(1),
        stride_numbers=numbers.stride(0),
        stride_numbers_block=numbers.stride(1),
        stride_counts=boxes.counts.stride(0),
        stride_masses=words.stride(0),
        stride_masses_part=words.stride(1),
        part_weight=OF_PART,
        part_of_dropped=PART_OF_DROPPED,
        context_len=chunk.context_len,
        num_tiles=chunk.num_tiles,
        num_kv_heads=chunk.kv.num_kv_heads,
        group_size=chunk.group_size,
        parts_per_tile=HALVES * rows_per_half // PART,
        sink_boxes=sink_boxes,
        local_boxes=local_boxes,
        max_boxes=numbers.shape[2],
    )
    library.launch("minference_select_boxes", arguments, masses.device)
