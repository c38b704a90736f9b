# SPDX-License-Identifier: Apache-2.0
"""Sparse prefill of one chunk in one layer: choose the keys, attend to them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from minference_vllm import ops
from minference_vllm.chunk import Chunk
from minference_vllm.index import SparseIndex
from minference_vllm.methods import Method
from minference_vllm.scratch import AttendBuffers


@dataclass(frozen=True, slots=True)
class LayerState:
    """What a layer brings to its chunks beside their tensors.

    Attributes:
        position: of the layer among the model's attention layers on this worker.
        budgets: [num_qo_heads, ...], see Method.
        buffers: the method's scratch.
        attend: what attending writes beside the output.
    """

    position: int
    budgets: torch.Tensor
    buffers: Any
    attend: AttendBuffers


Chooser = Callable[[Method, Chunk, LayerState], SparseIndex]
"""Whoever chooses the keys of a chunk. Tuning, benchmarks and evaluation put their own in place of `choose`, to look at
what a method chose or to have other keys attended to."""


def choose(method: Method, chunk: Chunk, layer: LayerState) -> SparseIndex:
    """The method chooses, as in service."""
    return method.choose(chunk, layer.budgets, layer.buffers)


def prefill(chunk: Chunk, method: Method, layer: LayerState, chooser: Chooser = choose) -> SparseIndex:
    """Attention of a chunk over the keys that matter to it (MInference, arXiv 2407.02490).

    Args:
        chunk: its `out` is written.
        method: how keys are chosen, and on which kernels.
        layer: whose budgets and scratch are used.
        chooser: who chooses the keys.

    Returns:
        What was attended to; its tensors are the scratch's, good until the next chunk.
    """
    index = chooser(method, chunk, layer)
    ops.attend(chunk, index, layer.attend, method.kernel)
    return index
