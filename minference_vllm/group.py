# SPDX-License-Identifier: Apache-2.0
"""The layers that share a metadata builder: when they look for a plan, and what follows once they have run it."""

from collections.abc import Sequence
from typing import Protocol

from minference_vllm.plan import Reason
from minference_vllm.runtime import Runtime


class Layer(Protocol):
    """What a group asks of its layers; see SparseLayerMixin."""

    dense_reason: Reason | None
    group: "LayerGroup | None"

    def step_in(self) -> None: ...
    def step_aside(self) -> None: ...


class LayerGroup:
    """Layers that run the same plan in the same step.

    They are ours from the step's plan until the last of those that go sparse has run it. In all other steps they are
    vLLM's own: layers that look for a plan and find none would cost a dense step a frame of Python each, and nine
    arguments passed on; giving them back in it, as much again.

    Args:
        layers: all of them, settled; in whatever order they run, each runs once a step.
        runtime: the one that they share.

    Attributes:
        is_in: whether the layers are ours now.
    """

    def __init__(self, layers: Sequence[Layer], runtime: Runtime) -> None:
        self.layers = layers
        self._runtime = runtime
        self._num_sparse = sum(layer.dense_reason is None for layer in layers)
        self._to_run = 0  # layers that have not yet run the plan
        # A group before this may have left them: vLLM also makes builders only to estimate its memory.
        for layer in layers:
            layer.group = self
            layer.step_in()
        self.is_in = True
        if not self._num_sparse:  # they never are
            self.step_aside()

    def open_step(self) -> None:
        """There is a plan: the layers are to look for it when they run next."""
        self._to_run = self._num_sparse
        if self._num_sparse and not self.is_in:
            self.is_in = True
            for layer in self.layers:
                layer.step_in()

    def count_layer(self) -> None:
        """A layer has run the plan: all its kernels are enqueued."""
        self._to_run -= 1
        if self._to_run == 0:
            self._runtime.copy_density()
            self.step_aside()

    def step_aside(self) -> None:
        """Leave all layers to vLLM until there is a plan again."""
        self.is_in = False
        for layer in self.layers:
            layer.step_aside()
