# SPDX-License-Identifier: Apache-2.0
"""Sparse prefill of one chunk in one layer: choose the keys, attend to them, check that they were enough."""

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
    """Measures how much attention of rows that did not choose the kept keys lies on them, and acts if it is too little.

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
    """What the sparse path needs of a layer, beside the tensors of its chunks.

    Attributes:
        position: place of the layer among the plugin's layers on this worker.
        budgets: [num_qo_heads, ...], see Method.
        buffers: the method's scratch.
        attend: what attending writes beside the output.
        guard: None if recall is not measured.
        number: the number by which log and metrics name the layer; -1 outside of an engine.
    """

    position: int
    budgets: torch.Tensor
    buffers: Any
    attend: AttendBuffers
    guard: Guard | None = None
    number: int = -1


Chooser = Callable[[Method, Chunk, LayerState], SparseIndex]
"""A function that chooses the keys of a chunk. Tuning, benchmarks and evaluation replace `choose` by their own, to look
at what a method chose or to attend to other keys. It is called for every layer, unless it is `repeatable`."""

REPEATABLE = "minference_repeatable"


def repeatable(chooser: Chooser) -> Chooser:
    """Mark a chooser that does nothing but launch, and the same for all layers of a step: see repeats.Repeats."""
    setattr(chooser, REPEATABLE, True)
    return chooser


@repeatable
def choose(method: Method, chunk: Chunk, layer: LayerState) -> SparseIndex:
    """Let the method choose, as in service."""
    return method.choose(chunk, layer.budgets, layer.buffers)


def prefill(chunk: Chunk, method: Method, layer: LayerState, chooser: Chooser = choose) -> SparseIndex:
    """Attention of a chunk over the keys that matter to it (MInference, arXiv 2407.02490).

    Args:
        chunk: its `out` is written.
        method: how keys are chosen, and on which kernels.
        layer: whose budgets and scratch are used.
        chooser: chooses the keys.

    Returns:
        The index that was attended to. Its tensors are part of the scratch, valid until the next chunk.
    """
    index = chooser(method, chunk, layer)
    ops.attend(chunk, index, layer.attend, method.kernel)
    if layer.guard is not None:
        watch(chunk, method, layer, layer.guard)
    return index


def watch(chunk: Chunk, method: Method, layer: LayerState, guard: Guard) -> None:
    """Measure each head's recall in a chunk; heads below a floor attend again, to all keys.

    The number of these heads stays on the device, so the host never waits for it. No state is carried from one chunk to
    the next, so chunks and requests may come in any order. Rows that attend to all keys anyway are left out: they would
    hide what the other rows miss.
    """
    num_rows, attend = method.choosing_rows(chunk), layer.attend
    if num_rows == 0:
        return
    rows = chunk.of_rows(0, num_rows)
    ops.measure_recall(rows, attend.lse, guard.floors, layer.position, guard.buffers, guard.totals, method.kernel)
    if any(guard.floors):
        ops.attend(rows, HeadIndex(guard.buffers.heads, guard.buffers.num_heads), attend, method.kernel)
