# SPDX-License-Identifier: Apache-2.0
"""The share of the attention of a chunk's held-out rows that lies on the kept keys."""

import torch

from minference_vllm import reference
from minference_vllm.chunk import Chunk
from minference_vllm.kernels import cuda, triton
from minference_vllm.ops.kernel import Kernel
from minference_vllm.recall import Floors, parts_of
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
    parts = parts_of(chunk.num_rows)
    for number, rows in enumerate(parts):
        part, of_part = chunk.of_rows(rows.start, len(rows)), lse[:, rows.start :]
        sums = cuda.probe.held_out_sums if _has_cuda_probe(kernel, part) else triton.held_out_sums
        ranges = sums(part, buffers)
        triton.measure_recall(part, of_part, floors, layer, ranges, number, len(parts), buffers, totals)


def _has_cuda_probe(kernel: Kernel, chunk: Chunk) -> bool:
    """Whether the CUDA kernel makes the partial softmaxes."""
    return kernel is Kernel.CUDA and cuda.probe.supports_held_out(chunk)
