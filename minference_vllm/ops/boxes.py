# SPDX-License-Identifier: Apache-2.0
"""Selects, by the masses of boxes, those that each block of lists scores finely."""

import torch

from minference_vllm import reference
from minference_vllm.boxes import GROUPS_PER_BOX, LISTS, Boxes
from minference_vllm.chunk import Chunk
from minference_vllm.index import HALVES
from minference_vllm.kernels import cuda, triton
from minference_vllm.ops.kernel import Kernel
from minference_vllm.reference.normalisers import PART


def select_boxes(
    box_masses: torch.Tensor,
    chunk: Chunk,
    share: torch.Tensor,
    rows_per_half: int,
    sink_boxes: int,
    local_boxes: int,
    boxes: Boxes,
    masses: torch.Tensor,
    kernel: Kernel,
) -> None:
    """See minference_vllm.reference.select_boxes.

    Raises:
        ValueError: there is no room for the chunk's blocks of lists, or for what is always kept.
    """
    blocks = -(-chunk.num_tiles * HALVES * rows_per_half // PART * chunk.group_size // LISTS)
    # The tiles of a block are consecutive, and each has its own local boxes: up to LISTS more than for a single tile.
    forced = min(sink_boxes + local_boxes, chunk.first_tile + chunk.num_tiles - 1) + LISTS
    sets, room, columns = boxes.numbers.shape
    if sets < chunk.kv.num_kv_heads or room < blocks or columns < forced or masses.shape[2] % GROUPS_PER_BOX:
        raise ValueError(
            f"boxes must hold {chunk.kv.num_kv_heads} sets, {blocks} blocks and {forced} boxes, got {sets}, {room} and "
            f"{columns}; and rows of masses be multiples of {GROUPS_PER_BOX}, got {masses.shape[2]}"
        )
    run = reference.select_boxes if kernel is Kernel.REFERENCE else triton.select_boxes
    if kernel is Kernel.CUDA and cuda.select.supports(box_masses):
        run = cuda.select.select_boxes
    run(box_masses, chunk, share, rows_per_half, sink_boxes, local_boxes, boxes, masses)
