# SPDX-License-Identifier: Apache-2.0
"""How much attention each part of a half gives to each group before the tile."""

import torch

from minference_vllm import reference
from minference_vllm.chunk import Chunk
from minference_vllm.index import GROUPS_PER_TILE, HALVES
from minference_vllm.kernels import cuda, triton
from minference_vllm.ops.kernel import Kernel
from minference_vllm.reference.normalisers import PART


def group_masses(
    chunk: Chunk, means: torch.Tensor, row_lse: torch.Tensor, first_head: int, masses: torch.Tensor, kernel: Kernel
) -> None:
    """See minference_vllm.reference.group_masses.

    Raises:
        ValueError: `masses` has no room for the chunk's parts and groups, or its heads straddle KV heads.
    """
    parts = chunk.num_tiles * HALVES * row_lse.shape[2] // PART
    groups = (chunk.first_tile + chunk.num_tiles - 1) * GROUPS_PER_TILE
    if masses.shape[1] < parts or masses.shape[2] < groups:
        raise ValueError(f"masses must hold {parts} parts and {groups} groups, got {tuple(masses.shape)}")
    heads_each = min(len(masses), chunk.group_size)
    if chunk.group_size % heads_each or len(masses) % heads_each or first_head % heads_each:
        raise ValueError(
            f"heads {first_head} .. {first_head + len(masses) - 1} are neither all heads of some KV heads nor an even "
            f"share of the {chunk.group_size} of one"
        )
    # The CUDA kernel takes no scales from the device.
    is_for_cuda = not chunk.is_quantized and cuda.masses.supports(chunk, means.dtype, row_lse.shape[2])
    if kernel is Kernel.REFERENCE:
        reference.group_masses(chunk, means, row_lse, first_head, masses)
    elif kernel is Kernel.CUDA and is_for_cuda:
        cuda.masses.group_masses(chunk, means, row_lse, first_head, masses)
    else:
        triton.group_masses(chunk, means, row_lse, first_head, masses)
