# SPDX-License-Identifier: Apache-2.0
"""How much attention each part of a half gives to each group, or box, before the tile."""

import torch

from minference_vllm import reference
from minference_vllm.boxes import BOX_MEAN, MEANS_PER_GROUP, Boxes
from minference_vllm.chunk import Chunk
from minference_vllm.index import HALVES, TILE
from minference_vllm.kernels import cuda, triton
from minference_vllm.ops.kernel import Kernel
from minference_vllm.reference.normalisers import PART
from minference_vllm.scratch import MEAN


def group_masses(
    chunk: Chunk,
    means: torch.Tensor,
    row_lse: torch.Tensor,
    masses: torch.Tensor,
    kernel: Kernel,
    boxes: Boxes | None = None,
) -> None:
    """See minference_vllm.reference.group_masses.

    Raises:
        ValueError: `masses` has no room for the chunk's heads, parts and groups.
    """
    _masses(chunk, means, row_lse, masses, MEAN, boxes, kernel)


def box_masses(chunk: Chunk, coarse: torch.Tensor, row_lse: torch.Tensor, masses: torch.Tensor, kernel: Kernel) -> None:
    """Masses of boxes in place of groups, from coarse means: see minference_vllm.reference.group_masses."""
    _masses(chunk, coarse, row_lse, masses, BOX_MEAN, None, kernel)


def _masses(
    chunk: Chunk,
    means: torch.Tensor,
    row_lse: torch.Tensor,
    masses: torch.Tensor,
    mean: int,
    boxes: Boxes | None,
    kernel: Kernel,
) -> None:
    parts = chunk.num_tiles * HALVES * row_lse.shape[2] // PART
    groups = (chunk.first_tile + chunk.num_tiles - 1) * TILE // (mean * MEANS_PER_GROUP)
    if len(masses) < chunk.num_qo_heads or masses.shape[1] < parts or masses.shape[2] < groups:
        wanted = f"{chunk.num_qo_heads} heads, {parts} parts and {groups} groups"
        raise ValueError(f"masses must hold {wanted}, got {tuple(masses.shape)}")
    run = triton.group_masses
    if kernel is Kernel.REFERENCE:
        run = reference.group_masses
    elif kernel is Kernel.CUDA and cuda.masses.supports(chunk, means.dtype, row_lse.shape[2]):
        run = cuda.masses.group_masses
    run(chunk, means, row_lse, masses, mean, boxes)
