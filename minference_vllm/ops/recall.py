# SPDX-License-Identifier: Apache-2.0
"""How much of their attention a chunk's held-out rows have on the keys that were kept."""

import torch

from minference_vllm import reference
from minference_vllm.chunk import Chunk
from minference_vllm.kernels import cuda, triton
from minference_vllm.ops.kernel import Kernel
from minference_vllm.recall import Floors
from minference_vllm.scratch import RecallBuffers, RecallTotals


def measure_recall(
    chunk: Chunk,
    lse: torch.Tensor,
    floors: Floors,
    layer: int,
    buffers: RecallBuffers,
    totals: RecallTotals,
    kernel: Kernel,
) -> None:
    """See minference_vllm.reference.measure_recall."""
    if kernel is Kernel.REFERENCE:
        reference.measure_recall(chunk, lse, floors, layer, buffers, totals)
        return
    if kernel is Kernel.CUDA and cuda.probe.supports_held_out(chunk):
        ranges = cuda.probe.held_out_sums(chunk, buffers)
    else:
        ranges = triton.held_out_sums(chunk, buffers)
    triton.measure_recall(chunk, lse, floors, layer, ranges, buffers, totals)
