# SPDX-License-Identifier: Apache-2.0
"""The model that is searched, run by vLLM in this process. It can read prompts with any chooser in its layers."""

from collections.abc import Mapping
from typing import Any

import torch

from minference_vllm.attention import Chooser
from minference_vllm.compat import engines, served_model
from minference_vllm.errors import ConfigError
from minference_vllm.offline import OPEN_GATE, our_layers, sound_snapshot, start_engine
from minference_vllm.patterns import Geometry
from minference_vllm.search.contender import Ground
from minference_vllm.search.prompts import Prompt, scored_from

ROWS_AT_ONCE = 512
"""Rows whose logits over the whole vocabulary are in memory at the same time."""


class Reader:
    """An engine whose layers have their keys chosen from outside.

    Args:
        model: directory, or name on the hub.
        options: arguments of vllm.LLM.

    Attributes:
        geometry: of the model.
        ground: its layers that may run sparse.

    Raises:
        ConfigError: the engine does not start, or the model cannot be searched.
    """

    def __init__(self, model: str, options: Mapping[str, Any]) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if options.get(name, 1) != 1:
                raise ConfigError(f"A search runs in one process, and {name} is {options[name]}: leave it out.")
        self._llm = start_engine(model, {**OPEN_GATE, "method": "block"}, options)
        layers = our_layers(self._llm, model)
        self.geometry: Geometry = served_model(self._llm.llm_engine.vllm_config, rank=0).geometry
        self._runtime = layers[0].runtime
        self.ground = _ground(layers, model)
        self._states = engines.States(self._llm)

    def read(self, prompt: Prompt, chooser: Chooser) -> torch.Tensor:
        """The states from which the scored tokens are predicted, [scored tokens, hidden size].

        Raises:
            ConfigError: not all of the prompt was read through the chooser.
        """
        self._runtime.chooser = chooser
        engines.read_tokens(self._llm, prompt)
        sound_snapshot(self._runtime)
        states = self._states.take()
        if len(states) != len(prompt):
            raise ConfigError(
                f"vLLM computed {len(states)} hidden states of {len(prompt)} tokens: leave out of --engine what "
                "has it pad, split or skip tokens."
            )
        return states[scored_from(prompt) - 1 : -1]

    def divergence(self, exact: torch.Tensor, other: torch.Tensor) -> float:
        """KL divergence of the next tokens that other states predict, in nats, a mean over the scored tokens."""
        total = 0.0
        for start in range(0, len(exact), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            wanted, found = (self._states.logits(states[rows]).float().log_softmax(-1) for states in (exact, other))
            total += float((wanted.exp() * (wanted - found)).sum())
        return total / len(exact)


def _ground(layers: list[Any], model: str) -> Ground:
    """What the layers that may run sparse have in common."""
    sparse = {layer.position: layer for layer in layers if layer.dense_reason is None}
    if not sparse:
        raise ConfigError(f"None of the attention layers of {model!r} may run sparse: the log says why.")
    shapes = {layer.shape for layer in sparse.values()}
    if len(shapes) > 1 or any(layer.index is None for layer in sparse.values()):
        raise ConfigError(f"The layers of {model!r} differ in their heads or have no numbers: no pattern file fits it.")
    [shape] = shapes
    if shape.has_fp8_kv:
        raise ConfigError("A search needs the cache in the model's dtype: leave kv_cache_dtype out of --engine.")
    runtime = layers[0].runtime
    indices = {position: layer.index for position, layer in sparse.items()}
    return Ground(indices, shape, runtime.device, runtime.method.kernel, runtime.floors)
