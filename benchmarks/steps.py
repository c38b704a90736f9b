# SPDX-License-Identifier: Apache-2.0
"""What the plugin adds to the host time of an engine's steps, timed while the engine serves, in the engine's process.

vLLM's own code, which the plugin's calls, is timed too and taken off; some of the clock's own time stays in.
"""

import functools
import statistics
import time
from dataclasses import dataclass
from typing import Any

clock = time.perf_counter


@dataclass
class AddedTime:
    """Host time that the plugin added to one step.

    Attributes:
        is_prefill: whether the step held more than decode rows.
        plan_us: microseconds in the metadata builder.
        layers_us: microseconds in all layers before they called vLLM's attention.
        num_layers: how many layers called it.
    """

    is_prefill: bool
    plan_us: float
    layers_us: float = 0.0
    num_layers: int = 0


@functools.cache
def time_steps() -> list[AddedTime]:
    """The one list that every step adds itself to, from the first call on. The model is loaded, in this process."""
    from minference_vllm.impl import SparseLayerMixin
    from minference_vllm.metadata import PlanningMixin

    steps: list[AddedTime] = []
    for builder in PlanningMixin.__subclasses__():
        _time_builds(builder, steps)
    for impl in SparseLayerMixin.__subclasses__():
        _time_layers(impl, steps)
    return steps


def summary(steps: list[AddedTime]) -> dict[str, Any]:
    """Medians, apart for steps that hold prompts and for others; None for what did not occur."""
    found: dict[str, Any] = {}
    for kind, is_prefill in (("decode", False), ("prefill", True)):
        some = [step for step in steps if step.is_prefill is is_prefill]
        found |= {
            f"{kind}_steps": len(some),
            f"{kind}_plan_us": _median([step.plan_us for step in some]),
            f"{kind}_layers_us": _median([step.layers_us for step in some if step.num_layers]),
        }
    return found


def _median(times: list[float]) -> float | None:
    return round(statistics.median(times), 1) if times else None


def _overridden(ours: type, method: str) -> Any:
    """The class of vLLM's whose method our class's overrides."""
    return next(kind for kind in ours.__mro__[1:] if method in vars(kind))


def _time_builds(ours: Any, steps: list[AddedTime]) -> None:
    stock = _overridden(ours, "build")
    our_build, stock_build = ours.build, stock.build
    inside = [0.0]

    def build_inside(self: Any, *arguments: Any, **settings: Any) -> Any:
        start = clock()
        metadata = stock_build(self, *arguments, **settings)
        inside[0] += clock() - start
        return metadata

    def build(self: Any, common_prefix_len: int, common: Any, *arguments: Any, **settings: Any) -> Any:
        inside[0] = 0.0
        clock()  # with the CPU's caches empty the first reading takes longer
        start = clock()
        metadata = our_build(self, common_prefix_len, common, *arguments, **settings)
        us = 1e6 * (clock() - start - inside[0])
        steps.append(AddedTime(common.max_query_len > 1, us))
        return metadata

    ours.build, stock.build = build, build_inside


# Signatures are written out, since to gather arguments takes as long as what is timed here.
def _reading(self, layer, q, k, v, kv_cache, attn_metadata, output, output_scale, output_block_scale):
    return clock()


def _time_layers(ours: Any, steps: list[AddedTime]) -> None:
    stock = _overridden(ours, "forward")
    our_forward, stock_forward = ours.forward, stock.forward
    began = [0.0]

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ):
        # A reading one call away is what vLLM's forward would come to without us; the second, of caches that hold it.
        _reading(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale)
        start = clock()
        read = _reading(
            self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )
        began[0] = clock() + read - start
        output = our_forward(
            self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )
        began[0] = 0.0
        return output

    def forward_inside(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ):
        if began[0] and steps:
            us = 1e6 * (clock() - began[0])
            steps[-1].layers_us += us
            steps[-1].num_layers += 1
        began[0] = 0.0
        return stock_forward(
            self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
        )

    ours.forward, stock.forward = forward, forward_inside
