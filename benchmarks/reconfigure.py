# SPDX-License-Identifier: Apache-2.0
"""Gives a running engine other settings of the plugin, so that many can be compared without starting an engine each."""

from dataclasses import replace
from typing import Any

from benchmarks import runtime
from minference_vllm.compat.engines import our_layers
from minference_vllm.config import MInferenceConfig
from minference_vllm.methods import make_method
from minference_vllm.recall import Floors

TAKEN = {"method", "recall_floor", "row_recall_floor"}
"""The settings that may differ from those with which the engine was started."""


def reconfigure(llm: Any, settings: dict[str, Any]) -> None:
    """Let an engine of this process choose keys, and guard the choice, by other settings from its next step on.

    Scratch is claimed anew, beside the memory that the engine has profiled.

    Args:
        llm: no request of it may be running.
        settings: all of the plugin's; the method must not be `auto`.

    Raises:
        ValueError: settings differ that only a start can change.
    """
    config = MInferenceConfig.model_validate(settings)
    running = runtime()
    others = {name for name, value in config if getattr(running.config, name) != value} - TAKEN
    if others or config.method.name == "auto":
        raise ValueError(
            f"only a start changes {', '.join(sorted(others)) or 'to the method auto'}: leave it as it was"
        )
    method = make_method(config.method, running.method.kernel)
    floors = Floors(config.recall_floor, config.row_recall_floor)
    scratch: dict[Any, Any] = {}
    for layer in our_layers(llm):
        if layer.dense_reason is not None:
            continue
        shape = layer.shape
        if shape not in scratch:
            scratch[shape] = method.scratch(shape, running.device)
        state = layer.layer_state
        guard = None if state.guard is None else replace(state.guard, floors=floors)
        budgets = method.budgets(shape.num_qo_heads, running.device)
        layer.layer_state = replace(state, budgets=budgets, buffers=scratch[shape], guard=guard)
    running.method, running.config, running.floors = method, config, floors
