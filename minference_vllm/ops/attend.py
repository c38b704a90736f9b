# SPDX-License-Identifier: Apache-2.0
"""Attention of a chunk over the keys that an index keeps."""

from minference_vllm import reference
from minference_vllm.chunk import Chunk
from minference_vllm.index import AnyIndex, BandIndex, TileIndex
from minference_vllm.kernels import cuda, triton
from minference_vllm.ops.kernel import Kernel
from minference_vllm.scratch import AttendBuffers


def attend(chunk: Chunk, index: AnyIndex, buffers: AttendBuffers, kernel: Kernel) -> None:
    """See minference_vllm.reference.attend."""
    if kernel is Kernel.REFERENCE:
        reference.attend(chunk, index, buffers)
    elif kernel is Kernel.CUDA and cuda.attend.supports(chunk):
        cuda.attend.attend(chunk, index, buffers)
    elif isinstance(index, BandIndex):
        triton.attend(chunk, index, buffers)
    elif isinstance(index, TileIndex):
        triton.attend_tiles(chunk, index, buffers)
    else:
        triton.attend_heads(chunk, index, buffers)
