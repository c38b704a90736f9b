# SPDX-License-Identifier: Apache-2.0
"""One way of choosing the keys of all layers, with budgets and scratch of its own, whatever the engine's method is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minference_vllm.attention import Guard, LayerState, choose
from minference_vllm.chunk import Chunk
from minference_vllm.index import SparseIndex
from minference_vllm.methods import Method, make_method
from minference_vllm.ops import Kernel
from minference_vllm.patterns import DENSE, PatternFile
from minference_vllm.recall import Floors
from minference_vllm.scratch import AttendBuffers, RecallBuffers, RecallTotals, ScratchShape
from minference_vllm.search.candidates import Candidates
from minference_vllm.search.pairs import every_key


@dataclass(frozen=True, slots=True)
class Contender:
    """A method and what it brings to each layer.

    Attributes:
        layers: by position among the plugin's layers; a layer that is missing here attends to all keys.
    """

    method: Method
    layers: Mapping[int, LayerState]

    def __call__(self, _: Method, chunk: Chunk, layer: LayerState) -> SparseIndex:
        """See attention.Chooser. The engine's own method is ignored."""
        ours = self.layers.get(layer.position)
        return every_key(chunk) if ours is None else choose(self.method, chunk, ours)


@dataclass(frozen=True, slots=True)
class Ground:
    """What all contenders share: the model's layers that may run sparse, and the device.

    Attributes:
        indices: the layers' indices in the whole model, by their positions among the plugin's layers.
        shape: of the layers' scratch.
        floors: of the guard, as in service.
    """

    indices: Mapping[int, int]
    shape: ScratchShape
    device: torch.device
    kernel: Kernel
    floors: Floors

    def of_candidates(self, candidates: Candidates) -> list[Contender]:
        """A contender for each candidate: all heads of all layers keep it, except those that the guard repairs."""
        method = make_method(candidates.settings, self.kernel)
        buffers, attend = self._scratch(method)
        guard, contenders = self._guard(), []
        for head in candidates.heads:
            budgets = self._budgets(method, [candidates.shared.budget(head)] * self.shape.num_qo_heads)
            layers = {at: LayerState(at, budgets, buffers, attend, guard) for at in self.indices}
            contenders.append(Contender(method, layers))
        return contenders

    def of_settings(self, settings: Any) -> Contender:
        """A method with these settings, as it is served without a pattern file."""
        method = make_method(settings, self.kernel)
        budgets = method.budgets(self.shape.num_qo_heads, self.device)
        return self._served(method, dict.fromkeys(self.indices, budgets))

    def of_file(self, file: PatternFile) -> Contender:
        """A pattern file as it is served."""
        method, budgets = make_method(file.settings, self.kernel), {}
        for at, index in self.indices.items():
            heads = file.layers[index]
            if heads != DENSE:
                budgets[at] = self._budgets(method, [file.budget(head) for head in heads])
        return self._served(method, budgets)

    def _served(self, method: Method, budgets: Mapping[int, torch.Tensor]) -> Contender:
        (buffers, attend), guard = self._scratch(method), self._guard()
        return Contender(method, {at: LayerState(at, each, buffers, attend, guard) for at, each in budgets.items()})

    def _guard(self) -> Guard:
        heads, num_layers = self.shape.num_qo_heads, max(self.indices) + 1
        totals = RecallTotals.allocate(num_layers, heads, self.device)
        return Guard(self.floors, RecallBuffers.allocate(heads, self.device), totals)

    def _scratch(self, method: Method) -> tuple[Any, AttendBuffers]:
        attend = AttendBuffers.allocate(self.shape.num_qo_heads, self.shape.max_chunk, self.device)
        return method.scratch(self.shape, self.device), attend

    def _budgets(self, method: Method, rows: Sequence[Any]) -> torch.Tensor:
        return method.budgets(len(rows), self.device).copy_(torch.tensor(rows))
