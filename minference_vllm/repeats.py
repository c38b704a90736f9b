# SPDX-License-Identifier: Apache-2.0
"""Sparse prefill of the same chunk in many layers: the first is recorded, the others repeat its launches.

On an H100 a layer of a small model takes the GPU less than a millisecond, which is what the host needs to check and
describe a chunk and to launch its kernels from Python. Repeating takes half of that or less (docs/performance.md, "Host
time").
"""

from collections.abc import Hashable

import torch

from minference_vllm.attention import REPEATABLE, Chooser, LayerState, choose, prefill
from minference_vllm.chunk import Chunk, PagedKV
from minference_vllm.kernels.cuda.library import ALIGNMENT_BYTES
from minference_vllm.kernels.tape import Own, Tape, recording
from minference_vllm.methods import Method
from minference_vllm.ops import Kernel


class Repeats:
    """The tapes of a step, one for each chunk and shape of layers. All calls must be with the same method."""

    def __init__(self) -> None:
        self._tapes: dict[Hashable, Tape] = {}

    def prefill(self, chunk: Chunk, method: Method, layer: LayerState, chooser: Chooser = choose) -> None:
        """As attention.prefill, but repeats what an earlier layer has launched for the same rows, if one has."""
        if method.kernel is Kernel.REFERENCE or not getattr(chooser, REPEATABLE, False):
            prefill(chunk, method, layer, chooser)
            return
        own = _own(chunk, layer)
        likeness = chooser, _likeness(chunk, layer, own)
        if (tape := self._tapes.get(likeness)) is not None:
            tape.repeat(own)
            return
        tape = Tape(own)
        with recording(tape):
            prefill(chunk, method, layer, chooser)
        if not tape.is_ambiguous:
            self._tapes[likeness] = tape

    def forget(self) -> None:
        """Drop all tapes: the step is over. Tapes hold tensors of the step, such as its block table."""
        self._tapes.clear()


def _own(chunk: Chunk, layer: LayerState) -> Own:
    """The tensors that belong to one layer alone. All others that its kernels read or write are the runtime's."""
    kv, guard = chunk.kv, layer.guard
    totals = None if guard is None else guard.totals.layers[layer.position]
    # Values beside their keys move with these.
    v = None if _is_beside(kv) else kv.v
    return (
        chunk.q, chunk.out, kv.k, v, chunk.q_scale, kv.k_scale, kv.v_scale, chunk.sinks, layer.budgets, totals,
    )  # fmt: skip


def _is_beside(kv: PagedKV) -> bool:
    """Whether a token's values lie in the same row of memory as its keys, as in vLLM's cache."""
    return 0 < kv.v.data_ptr() - kv.k.data_ptr() < kv.k.stride(2) * kv.k.element_size()


def _likeness(chunk: Chunk, layer: LayerState, own: Own) -> Hashable:
    """What two layers must have in common for one to repeat what the other has launched."""
    kv, guard = chunk.kv, layer.guard
    beside = kv.v.data_ptr() - kv.k.data_ptr() if own[3] is None else None
    guarded = None if guard is None else (id(guard.buffers), id(guard.totals), guard.floors)
    shared = id(layer.buffers), id(layer.attend), guarded
    rows = chunk.context_len, chunk.may_end_prompt, chunk.scale, kv.block_table.data_ptr(), kv.block_table.stride(0)
    return shared, rows, kv.row, beside, *map(_form, own)


def _form(tensor: torch.Tensor | None) -> Hashable:
    """All of a tensor that checks and launches depend on, except where it is."""
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % ALIGNMENT_BYTES
