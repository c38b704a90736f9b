# SPDX-License-Identifier: Apache-2.0
"""Sparse prefill of one chunk in one layer: choose the keys, attend to them, see that they were enough."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from minference_vllm import ops
from minference_vllm.chunk import Chunk
from minference_vllm.index import HeadIndex, SparseIndex
from minference_vllm.methods import Method
from minference_vllm.recall import Floors
from minference_vllm.scratch import AttendBuffers, RecallBuffers, RecallTotals


@dataclass(frozen=True, slots=True)
class Guard:
    """What measures whether the kept keys hold the attention of rows that did not choose them, and acts on it.

    Attributes:
        floors: a head that is below one of them in a chunk attends to all keys, in this chunk.
        buffers: what a chunk's measurement writes.
        totals: what is measured of all layers since the start.
    """

    floors: Floors
    buffers: RecallBuffers
    totals: RecallTotals


@dataclass(frozen=True, slots=True)
class LayerState:
    """What a layer brings to its chunks beside their tensors.

    Attributes:
        position: of the layer among the model's attention layers on this worker.
        budgets: [num_qo_heads, ...], see Method.
        buffers: the method's scratch.
        attend: what attending writes beside the output.
        guard: None if recall is not measured.
        number: by which log and metrics name it; -1 outside of an engine.
    """

    position: int
    budgets: torch.Tensor
    buffers: Any
    attend: AttendBuffers
    guard: Guard | None = None
    number: int = -1


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
    if layer.guard is not None:
        watch(chunk, method, layer, layer.guard)
    return index


def watch(chunk: Chunk, method: Method, layer: LayerState, guard: Guard) -> None:
    """Measure each head's recall in a chunk; heads below a floor attend again, to all keys.

    How many they are stays on the device, and nothing of a chunk is remembered for the next: so it holds for any order
    of chunks and requests. Rows that attend to all keys anyway are left out: they would hide what the others miss.
    """
    num_rows, attend = method.choosing_rows(chunk), layer.attend
    if num_rows == 0:
        return
    rows = chunk.of_rows(0, num_rows)
    ops.measure_recall(rows, attend.lse, guard.floors, layer.position, guard.buffers, guard.totals, method.kernel)
    if any(guard.floors):
        ops.attend(rows, HeadIndex(guard.buffers.heads, guard.buffers.num_heads), attend, method.kernel)
