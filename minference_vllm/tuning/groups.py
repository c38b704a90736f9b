# SPDX-License-Identifier: Apache-2.0
"""Draws groups at random, as `block` keeps them on real prompts."""

import torch

from minference_vllm.chunk import Chunk
from minference_vllm.index import EVERY_GROUP, GROUPS_PER_TILE, TileIndex
from minference_vllm.methods import Block

# With the default settings a tile keeps the share DENSITY in prompts of AT_TOKENS tokens. From 3.7K tokens up to there
# it falls as measured (docs/methods.md). Beyond, where tiles drop by another rule, it falls more slowly.
DENSITY, AT_TOKENS, FALLS, FALLS_BEYOND = 0.148, 28_200, 0.5, 0.336
FINE, FINE_AT_TOKENS, FINE_FALLS = 0.60, 27_500, 0.08
"""Share of boxes that are scored finely on real prompts (docs/methods.md). It falls with length, as density does."""

STAYS = 0.9
"""Share of a tile's groups that the next tile keeps too. An assumption: neighbours look at much the same keys."""


def density_at(tokens: int) -> float:
    """Share of the keys before a tile that the tile keeps, in a prompt of this many tokens."""
    return min(1.0, DENSITY * (AT_TOKENS / tokens) ** (FALLS if tokens < AT_TOKENS else FALLS_BEYOND))


def fine_at(tokens: int) -> float:
    """Share of the boxes before a tile that are scored finely, in a prompt of this many tokens."""
    return min(1.0, FINE * (FINE_AT_TOKENS / tokens) ** FINE_FALLS)


def as_on_real_prompts(method: Block, tokens: int) -> Block:
    """The method, limited to the boxes that it scores finely on real prompts: it cannot tell random boxes apart."""
    most = min(fine_at(tokens), method.settings.max_fine)
    return Block(method.settings.model_copy(update={"max_fine": most}), method.kernel)


def draw_groups(chunk: Chunk, method: Block, seed: int, density: float | None = None) -> TileIndex:
    """For each tile of the chunk and each head: the first groups, those just before the tile, and random ones. Tiles
    that keep everything get all groups.

    Args:
        method: says how many groups are always kept, and which tiles keep everything.
        density: share of the groups before a tile that the tile keeps; None for the share in real prompts of this
            length.
    """
    density = density_at(chunk.seq_len) if density is None else density
    sink_groups, local_groups = method.sink_groups, method.local_groups
    heads, device = chunk.num_qo_heads, chunk.q.device
    generator = torch.Generator(device).manual_seed(seed + chunk.seq_len)
    last = (chunk.first_tile + chunk.num_tiles - 1) * GROUPS_PER_TILE
    score = torch.rand(heads, last, device=device, generator=generator)
    tiles = []
    for tile in range(chunk.first_tile, chunk.first_tile + chunk.num_tiles):
        before = tile * GROUPS_PER_TILE
        kept = min(before, max(round(density * before), sink_groups + local_groups))
        forced = score[:, :before].clone()
        forced[:, :sink_groups] += 1
        forced[:, max(before - local_groups, 0) :] += 1
        tiles.append(forced.topk(kept).indices.int().sort(dim=1).values)
        redrawn = torch.rand(score.shape, device=device, generator=generator)
        # A group that is redrawn is no more likely to be kept than any other.
        score = torch.where(torch.rand(score.shape, device=device, generator=generator) < STAYS, score, redrawn)
    counts = torch.zeros(heads, len(tiles), 3, dtype=torch.int32, device=device)
    groups = torch.zeros(
        heads, len(tiles), max(1, *(tile.shape[1] for tile in tiles)), dtype=torch.int32, device=device
    )
    for number, listed in enumerate(tiles):
        counts[:, number, 0] = listed.shape[1]
        groups[:, number, : listed.shape[1]] = listed
    choosing = chunk.of_rows(0, method.choosing_rows(chunk)).num_tiles
    counts[:, choosing:] = torch.tensor([EVERY_GROUP, 0, 0], device=device)
    return TileIndex(groups, counts, long_tiles=len(tiles) - choosing)
