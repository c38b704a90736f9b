# SPDX-License-Identifier: Apache-2.0
"""Lists, by the masses of groups, those that each tile keeps."""

import torch

from minference_vllm import reference
from minference_vllm.chunk import Chunk
from minference_vllm.index import HALVES, TileIndex
from minference_vllm.kernels import cuda, triton
from minference_vllm.ops.kernel import Kernel
from minference_vllm.reference.normalisers import PART


def select_groups(
    masses: torch.Tensor,
    chunk: Chunk,
    share: torch.Tensor,
    rows_per_half: int,
    sink_groups: int,
    local_groups: int,
    long_groups: int,
    by_tile: bool,
    index: TileIndex,
    kernel: Kernel,
) -> None:
    """See minference_vllm.reference.select_groups.

    Raises:
        ValueError: `rows_per_half` is not 16, 32 or 64, or `masses` has no room for the chunk's heads and parts.
    """
    parts = chunk.num_tiles * HALVES * rows_per_half // PART
    if rows_per_half not in (16, 32, 64) or len(masses) < chunk.num_qo_heads or masses.shape[1] < parts:
        raise ValueError(
            f"rows_per_half must be 16, 32 or 64 and masses hold {chunk.num_qo_heads} heads and all parts of the "
            f"{chunk.num_tiles} tiles, got {rows_per_half} and {tuple(masses.shape)}"
        )
    if kernel is Kernel.CUDA and by_tile and cuda.select.supports(masses):
        cuda.select.select_groups(masses, chunk, share, rows_per_half, sink_groups, local_groups, long_groups, index)
        return
    run = reference.select_groups if kernel is Kernel.REFERENCE else triton.select_groups
    run(masses, chunk, share, rows_per_half, sink_groups, local_groups, long_groups, by_tile, index)
