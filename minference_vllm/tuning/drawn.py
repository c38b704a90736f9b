# SPDX-License-Identifier: Apache-2.0
"""Which keys are attended to where times are taken on random data, for each method.

Random queries and keys attend to everything alike, so a method finds in them what it finds in no real prompt. It does
all its work there, as in service; what is attended to is drawn.
"""

from dataclasses import replace
from functools import singledispatch

import torch

from minference_vllm import ops
from minference_vllm.attention import Chooser, LayerState, choose
from minference_vllm.chunk import Chunk
from minference_vllm.index import SparseIndex
from minference_vllm.methods import Block, Method, VerticalSlash
from minference_vllm.tuning.groups import as_on_real_prompts, draw_groups
from minference_vllm.tuning.masses import KeySets


@singledispatch
def drawn_choice(method: Method, chunk: Chunk, layer: LayerState, seed: int) -> Chooser:
    """Who chooses the keys of this chunk; a method for which nothing is drawn chooses by itself.

    Drawing happens here, so that the chooser's time is the method's own.
    """
    return choose


@drawn_choice.register
def _drawn_bands(method: VerticalSlash, chunk: Chunk, layer: LayerState, seed: int) -> Chooser:
    """The probe in full, then the index of masses that lie elsewhere and that it cannot overwrite."""
    probe = layer.buffers.probe
    masses = replace(probe, vertical=torch.zeros_like(probe.vertical), slash=torch.zeros_like(probe.slash))
    KeySets(seed).overwrite(masses, chunk.seq_len, method.settings)
    drawn = replace(layer.buffers, probe=masses)

    def choose_drawn(_: Method, chunk: Chunk, layer: LayerState) -> SparseIndex:
        ops.probe(chunk, *method.settings.probe_counts, layer.buffers.probe, method.kernel)
        return method.index_masses(chunk.seq_len, layer.budgets, drawn)

    return choose_drawn


@drawn_choice.register
def _drawn_groups(method: Block, chunk: Chunk, layer: LayerState, seed: int) -> Chooser:
    """The whole choice, with as many boxes scored finely as on a real prompt; nothing of it is used."""
    index = draw_groups(chunk, method, seed)
    chooser = as_on_real_prompts(method, chunk.seq_len)

    def choose_drawn(_: Method, chunk: Chunk, layer: LayerState) -> SparseIndex:
        choose(chooser, chunk, layer)
        return index

    return choose_drawn
