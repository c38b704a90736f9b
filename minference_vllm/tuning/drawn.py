# SPDX-License-Identifier: Apache-2.0
"""Which keys are attended to when times are taken on random data, for each method.

Random queries attend to all random keys alike, so a method would keep other keys than on any real prompt. The method
therefore does all its work as in service, but the keys that are then attended to are drawn at random.
"""

from dataclasses import replace
from functools import singledispatch

import torch

from minference_vllm import ops
from minference_vllm.attention import Chooser, LayerState, choose, repeatable
from minference_vllm.chunk import Chunk
from minference_vllm.index import SparseIndex
from minference_vllm.methods import Block, Method, VerticalSlash
from minference_vllm.tuning.groups import as_on_real_prompts, draw_groups
from minference_vllm.tuning.masses import KeySets


@singledispatch
def drawn_choice(method: Method, chunk: Chunk, layer: LayerState, seed: int) -> Chooser:
    """The chooser of keys for this chunk. A method for which nothing is drawn chooses by itself.

    Keys are drawn here and not by the chooser, so that the chooser takes the method's own time.
    """
    return choose


@drawn_choice.register
def _drawn_bands(method: VerticalSlash, chunk: Chunk, layer: LayerState, seed: int) -> Chooser:
    """Runs the whole probe, then indexes drawn masses, which lie in buffers that the probe does not overwrite."""
    probe = layer.buffers.probe
    masses = replace(probe, vertical=torch.zeros_like(probe.vertical), slash=torch.zeros_like(probe.slash))
    KeySets(seed).overwrite(masses, chunk.seq_len, method.settings)
    drawn = replace(layer.buffers, probe=masses)

    @repeatable
    def choose_drawn(_: Method, chunk: Chunk, layer: LayerState) -> SparseIndex:
        ops.probe(chunk, *method.settings.probe_counts, layer.buffers.probe, method.kernel)
        return method.index_masses(chunk.seq_len, layer.budgets, drawn)

    return choose_drawn


@drawn_choice.register
def _drawn_groups(method: Block, chunk: Chunk, layer: LayerState, seed: int) -> Chooser:
    """Makes the whole choice, with as many boxes scored finely as on a real prompt, then uses drawn groups instead."""
    index = draw_groups(chunk, method, seed)
    chooser = as_on_real_prompts(method, chunk.seq_len)

    @repeatable
    def choose_drawn(_: Method, chunk: Chunk, layer: LayerState) -> SparseIndex:
        choose(chooser, chunk, layer)
        return index

    return choose_drawn
