# SPDX-License-Identifier: Apache-2.0
"""The normalisers of the scores of the rows that choose groups."""

import torch

from minference_vllm import reference
from minference_vllm.chunk import Chunk
from minference_vllm.index import HALVES
from minference_vllm.kernels import triton
from minference_vllm.ops.kernel import Kernel


def row_normalisers(chunk: Chunk, means: torch.Tensor, row_lse: torch.Tensor, kernel: Kernel) -> None:
    """See minference_vllm.reference.row_normalisers.

    Raises:
        ValueError: `row_lse` has no room for the chunk's rows, is not laid out as kernels read it, or the rows of a
        half are not 16, 32 or 64.
    """
    if row_lse.shape[2] not in (16, 32, 64):
        raise ValueError(f"rows_per_half must be 16, 32 or 64, got {row_lse.shape[2]}")
    if row_lse.shape[1] < chunk.num_tiles * HALVES or row_lse.stride()[1:] != (row_lse.shape[2], 1):
        raise ValueError(
            f"row_lse must hold {chunk.num_tiles * HALVES} halves of rows that follow each other, "
            f"got {tuple(row_lse.shape)} with strides {row_lse.stride()}"
        )
    run = reference.row_normalisers if kernel is Kernel.REFERENCE else triton.row_normalisers
    run(chunk, means, row_lse)
