# SPDX-License-Identifier: Apache-2.0
"""Draws sets of keys as real prompts have them, for models whose weights are made up.

Made-up weights attend to everything alike, so that their heaviest diagonals and groups are scattered over the whole
prompt, unlike those of any trained model. Here the method chooses as always, but the keys that are attended to are
drawn.
"""

from minference_vllm import ops
from minference_vllm.attention import Chooser, LayerState, repeatable
from minference_vllm.chunk import Chunk
from minference_vllm.index import BandIndex, SparseIndex
from minference_vllm.methods import Block, Method, VerticalSlash
from minference_vllm.tuning.drawn import drawn_choice
from minference_vllm.tuning.groups import AT_TOKENS, DENSITY, FALLS, FALLS_BEYOND, FINE, FINE_AT_TOKENS, FINE_FALLS
from minference_vllm.tuning.masses import CLUSTER, KeySets
from minference_vllm.tuning.timing import LOWEST_FLOORS as LOWEST

DESCRIPTION = (
    "synthetic. vertical_slash: the probe, the selection and the index run in full, but between probe and selection "
    "its masses are replaced by drawn ones (a device copy, counted in the time). Verticals are the sinks and random "
    f"columns; slashes are half a contiguous local band and half clusters of {CLUSTER} at random distances. block: the "
    "whole choice runs, and drawn groups are attended to, of the density that real prompts of the length have "
    f"({DENSITY} at {AT_TOKENS} tokens, falling as length^-{FALLS} up to there and as length^-{FALLS_BEYOND} beyond; "
    "docs/methods.md). Random keys all look alike, so "
    "max_fine is lowered by length: to the share of boxes that real prompts of the length that a chunk ends at have "
    f"scored finely ({FINE} at {FINE_AT_TOKENS} tokens, falling as length^-{FINE_FALLS}). Drawn for each query head, "
    "with a fixed seed, once for each length that a chunk ends at, during the warm-up; all layers use the same."
)

LOWEST_FLOORS = {"recall_floor": LOWEST.head, "row_recall_floor": LOWEST.row}
GUARD = (
    "recall is measured and the guard's kernels are launched, as in service; drawn keys hold little recall, so the "
    "floors are the lowest above 0, and the guard finds no head below them. redone: share of heads that it did find"
)


def make_chooser(seed: int) -> Chooser:
    """A chooser that keeps drawn sets."""
    sets = KeySets(seed)
    drawn: dict[tuple[int, int, bool], Chooser] = {}

    def choose_bands(method: VerticalSlash, chunk: Chunk, layer: LayerState) -> BandIndex:
        probe = layer.buffers.probe
        ops.probe(chunk, *method.settings.probe_counts, probe, method.kernel)
        sets.overwrite(probe, chunk.seq_len, method.settings)
        return method.index_masses(chunk.seq_len, layer.budgets, layer.buffers)

    def choose_groups(method: Block, chunk: Chunk, layer: LayerState) -> SparseIndex:
        ends = (chunk.context_len, chunk.seq_len, chunk.may_end_prompt)
        if ends not in drawn:
            drawn[ends] = drawn_choice(method, chunk, layer, seed)
        return drawn[ends](method, chunk, layer)

    @repeatable
    def choose_drawn(method: Method, chunk: Chunk, layer: LayerState) -> SparseIndex:
        if isinstance(method, Block):
            return choose_groups(method, chunk, layer)
        return choose_bands(method, chunk, layer)

    return choose_drawn
