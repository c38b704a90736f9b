# SPDX-License-Identifier: Apache-2.0
"""Attention of a chunk's probe rows over all keys, summed by column and by diagonal."""

from minference_vllm import reference
from minference_vllm.chunk import Chunk
from minference_vllm.kernels import cuda, triton
from minference_vllm.ops.kernel import Kernel
from minference_vllm.scratch import ProbeBuffers


def probe(chunk: Chunk, num_last: int, num_spread: int, buffers: ProbeBuffers, kernel: Kernel) -> None:
    """See minference_vllm.reference.probe."""
    if kernel is Kernel.REFERENCE:
        reference.probe(chunk, num_last, num_spread, buffers)
    elif kernel is Kernel.CUDA and cuda.probe.supports(chunk, num_last, num_spread):
        cuda.probe.probe(chunk, num_last, num_spread, buffers)
    else:
        triton.probe(chunk, num_last, num_spread, buffers)
