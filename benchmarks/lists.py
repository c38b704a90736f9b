# SPDX-License-Identifier: Apache-2.0
"""Tile lists that `block` chose on a real prompt, kept in a file; they can be carried over to more heads and tokens."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minference_vllm.index import EVERY_GROUP, GROUPS_PER_TILE, TileIndex

FIRST_GROUPS = 4
"""Groups at the prompt's beginning that stay there when lists are carried over: those of the default `sink_tokens`."""


@dataclass(frozen=True, slots=True)
class Lists:
    """The lists of a prompt's last tiles, in some layers.

    Attributes:
        groups: [layers, heads, tiles, max_groups] int32, valid up to the tile's count; see TileIndex.
        counts: [layers, heads, tiles, 3] int32.
        first_tile: the number, in the prompt, of the tile with which the lists begin.
        about: how they were recorded: "layers" by number, "num_kv_heads", "head_dim", "tokens", and more.
    """

    groups: torch.Tensor
    counts: torch.Tensor
    first_tile: int
    about: dict[str, Any]

    @property
    def num_tiles(self) -> int:
        return self.counts.shape[2]

    def save(self, path: Path) -> None:
        """Write the file, compressed: the valid entries of all lists, one after the other."""
        groups = self.groups[_is_listed(self.groups, self.counts)].numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:  # given a path, numpy would add a suffix to the name
            np.savez_compressed(
                file,
                groups=groups.astype(np.min_scalar_type(int(groups.max(initial=0)))),
                counts=self.counts.numpy(),
                first_tile=self.first_tile,
                about=json.dumps(self.about),
            )

    @classmethod
    def load(cls, path: Path) -> "Lists":
        """What `save` has written.

        Raises:
            SystemExit: the file is something else.
        """
        try:
            with np.load(path) as found:
                counts = torch.from_numpy(found["counts"])
                flat = torch.from_numpy(found["groups"].astype(np.int32))
                first_tile, about = int(found["first_tile"]), json.loads(str(found["about"]))
        except (OSError, KeyError, ValueError) as error:
            raise SystemExit(f"{path} holds no lists that benchmarks.record has written: {error}") from None
        longest = int(counts.clamp(min=0).sum(-1).max())
        groups = torch.zeros(*counts.shape[:3], max(1, longest), dtype=torch.int32)
        groups[_is_listed(groups, counts)] = flat
        return cls(groups, counts, first_tile, about)

    def of_layer(self, number: int) -> TileIndex:
        """The lists of one layer, as they were chosen."""
        return TileIndex(self.groups[number], self.counts[number], _long_tiles(self.counts[number]))

    def carried(self, first_tile: int, num_tiles: int, heads: tuple[int, int], repeats: bool) -> TileIndex:
        """Lists for tiles of a longer prompt and for other heads, made of these.

        Tiles follow each other as in these lists, and begin again with the first after the last. The tiles at the
        prompt's end that keep all keys under every head become the last ones of the longer prompt. The query heads of
        one KV head get the lists of heads that share a KV head here. Groups keep their distances to the tile, except
        for the first groups, which stay the first.

        Args:
            first_tile, num_tiles: of the longer prompt's chunk.
            heads: query heads and KV heads.
            repeats: whether what a tile looks at before it is repeated back to the prompt's beginning. Otherwise a tile
                looks no further back than here, and density falls as the length grows.
        """
        sources = [self._source(head, heads) for head in range(heads[0])]
        last = min(_long_tiles(self.counts.flatten(0, 1)), self.num_tiles - 1)
        order = [number % (self.num_tiles - last) for number in range(num_tiles - last)]
        lists = [
            [self._moved(*source, here, tile, repeats) for source in sources]
            for tile, here in enumerate([*order, *range(self.num_tiles - last, self.num_tiles)], first_tile)
        ]
        return _as_index(lists)

    def _source(self, head: int, heads: tuple[int, int]) -> tuple[int, int]:
        """The layer and the head whose lists this head gets."""
        layers, num_heads = self.counts.shape[:2]
        own_size, size = num_heads // self.about["num_kv_heads"], heads[0] // heads[1]
        layer, kv_head = divmod(head // size % (layers * self.about["num_kv_heads"]), self.about["num_kv_heads"])
        return layer, kv_head * own_size + head % size % own_size

    def _moved(self, layer: int, head: int, here: int, tile: int, repeats: bool) -> list[torch.Tensor] | None:
        """A tile's list at another tile: what both halves keep, what the first, what the second; None for all keys."""
        counts = self.counts[layer, head, here].tolist()
        if counts[0] == EVERY_GROUP:
            return None
        before, length = tile * GROUPS_PER_TILE, (self.first_tile + here) * GROUPS_PER_TILE
        parts = self.groups[layer, head, here, : sum(counts)].split(counts)
        return [_move(part, length, before, repeats) for part in parts]


def _move(groups: torch.Tensor, length: int, before: int, repeats: bool) -> torch.Tensor:
    """The groups of a tile with `length` groups before it, moved to a tile that has `before` groups before it."""
    first, near = groups[groups < FIRST_GROUPS], groups[groups >= FIRST_GROUPS]
    # A step is as long as the groups before the tile, without the first ones, so that repeated groups never coincide.
    steps = range(0, max(before, 1) if repeats else 1, max(length - FIRST_GROUPS, 1))
    moved = torch.cat([near + (before - length) - step for step in reversed(steps)])
    return torch.cat([first, moved[moved >= FIRST_GROUPS]])


def _is_listed(groups: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Which entries of lists are valid."""
    return torch.arange(groups.shape[-1]) < counts.clamp(min=0).sum(-1, keepdim=True)


def _as_index(lists: list[list[list[torch.Tensor] | None]]) -> TileIndex:
    """An index from lists by tile and head, each of three parts."""
    longest = max((sum(map(len, parts)) for of_tile in lists for parts in of_tile if parts), default=0)
    groups = torch.zeros(len(lists[0]), len(lists), max(1, longest), dtype=torch.int32)
    counts = torch.zeros(len(lists[0]), len(lists), 3, dtype=torch.int32)
    for tile, of_tile in enumerate(lists):
        for head, parts in enumerate(of_tile):
            if parts is None:
                counts[head, tile, 0] = EVERY_GROUP
                continue
            joined = torch.cat(parts)
            groups[head, tile, : len(joined)] = joined
            counts[head, tile] = torch.tensor([len(part) for part in parts])
    return TileIndex(groups, counts, _long_tiles(counts))


def _long_tiles(counts: torch.Tensor) -> int:
    """How many tiles at the chunk's end keep all keys under every head."""
    keeps_all = (counts[..., 0] == EVERY_GROUP).all(0)
    return int(keeps_all.flip(0).int().cumprod(0).sum())


def kept_share(index: TileIndex, first_tile: int) -> float:
    """Share of the groups before a tile that its halves keep: the mean over tiles and heads."""
    before = (first_tile + torch.arange(index.counts.shape[1], device=index.counts.device)) * GROUPS_PER_TILE
    both, first, second = index.counts.double().unbind(-1)
    kept = torch.where(both == EVERY_GROUP, before, both + (first + second) / 2)
    return float((kept / before.clamp(min=1)).mean())
