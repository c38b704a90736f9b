# SPDX-License-Identifier: Apache-2.0
"""Records what a method chooses for one prompt, as a picture needs it: counted in cells of some rows by some keys.

It takes the place of the chooser (attention.Chooser), so it sees exactly the keys that are attended to. It waits for
the device.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from minference_vllm.attention import LayerState, choose
from minference_vllm.chunk import Chunk
from minference_vllm.index import GROUP, GROUPS_PER_TILE, HALF, HALVES, TILE, BandIndex, SparseIndex
from minference_vllm.methods import Method
from minference_vllm.reference.attend import kept_before, kept_by_tile

MAX_CELLS = 256
"""Cells along each side of a map, at most. In longer prompts tiles are left out, evenly, and a cell spans more keys."""


@dataclass(slots=True)
class LayerChoice:
    """What the heads of one layer kept, in the tiles that are looked at.

    Attributes:
        kept: [num_heads, rows, columns] float32, row-key pairs kept in each cell; None if no map is wanted.
        causal: [rows, columns] float32, pairs of each cell that dense attention would compute.
        kept_pairs: [num_heads] float64, pairs kept in all cells.
        causal_pairs: pairs of one head that dense attention would compute.
    """

    kept: torch.Tensor | None
    causal: torch.Tensor
    kept_pairs: torch.Tensor
    causal_pairs: float = 0.0

    @property
    def density(self) -> torch.Tensor:
        """[num_heads]"""
        return self.kept_pairs / self.causal_pairs

    def shares(self, head: int) -> torch.Tensor:
        """[rows, columns], the share of each cell that a head kept; NaN where no row sees a key."""
        assert self.kept is not None
        return self.kept[head] / self.causal


class Capture:
    """A chooser that lets the method choose, and counts what it chose.

    Args:
        num_tokens: of the prompt.
        mapped: positions of the layers whose maps are wanted.

    Attributes:
        layers: by position, see LayerState.
        tile_step: one of so many tiles is looked at.
        cell: rows and keys that a cell stands for.
        size: rows and columns of a map, in cells.
    """

    def __init__(self, num_tokens: int, mapped: Collection[int]) -> None:
        self.num_tokens = num_tokens
        self.layers: dict[int, LayerChoice] = {}
        self.tile_step = -(-num_tokens // (TILE * MAX_CELLS))
        self.cell = TILE * self.tile_step, -(-num_tokens // (GROUP * MAX_CELLS)) * GROUP
        self.size = -(-num_tokens // self.cell[0]), -(-num_tokens // self.cell[1])
        self._mapped = mapped

    def __call__(self, method: Method, chunk: Chunk, layer: LayerState) -> SparseIndex:
        """See attention.Chooser."""
        index = choose(method, chunk, layer)
        self.count(chunk, _on_host(index), layer.position)
        return index

    def count(self, chunk: Chunk, index: SparseIndex, position: int) -> None:
        """Add a chunk to what its layer kept; the index is on the host."""
        if position not in self.layers:
            self.layers[position] = self._empty(chunk.num_qo_heads, position in self._mapped)
        found = self.layers[position]
        for tile, half, rows in halves(chunk):
            if tile % self.tile_step:
                continue
            row, before = tile // self.tile_step, tile * GROUPS_PER_TILE
            own = own_pairs(tile, rows)
            seen = self._cells(torch.cat([torch.full((before,), GROUP * len(rows)), own]))
            found.causal[row] += seen
            found.causal_pairs += float(seen.sum())
            for head in range(chunk.num_qo_heads):
                if isinstance(index, BandIndex):
                    keys = kept_before(index, head, tile, half)
                else:
                    keys = kept_by_tile(index, head, tile, half, chunk.first_tile)
                earlier = torch.bincount(keys // GROUP, minlength=before) * len(rows)
                cells = self._cells(torch.cat([earlier, own]))
                found.kept_pairs[head] += cells.sum()
                if found.kept is not None:
                    found.kept[head, row] += cells

    def _empty(self, num_heads: int, is_mapped: bool) -> LayerChoice:
        kept = torch.zeros(num_heads, *self.size) if is_mapped else None
        return LayerChoice(kept, torch.zeros(self.size), torch.zeros(num_heads, dtype=torch.float64))

    def _cells(self, groups: torch.Tensor) -> torch.Tensor:
        """[columns]: the sums over each column of a number that is given for each group, from the first group on."""
        number = torch.arange(len(groups)) * GROUP // self.cell[1]
        cells = torch.zeros(max(self.size[1], int(number[-1]) + 1), dtype=torch.int64)
        # The tile's last groups may lie past the prompt's end, where no row sees a key.
        return cells.index_add_(0, number, groups)[: self.size[1]]


def halves(chunk: Chunk) -> Iterator[tuple[int, int, range]]:
    """Tile, half and absolute rows of each half of a tile that holds rows of the chunk."""
    for number in range(chunk.context_len // HALF, (chunk.seq_len - 1) // HALF + 1):
        rows = range(max(number * HALF, chunk.context_len), min(number * HALF + HALF, chunk.seq_len))
        yield *divmod(number, HALVES), rows


def own_pairs(tile: int, rows: range) -> torch.Tensor:
    """[GROUPS_PER_TILE] int64: causal pairs of these rows with each group of their own tile."""
    first = tile * TILE + torch.arange(GROUPS_PER_TILE) * GROUP
    return (torch.tensor(rows)[:, None] - first + 1).clamp(0, GROUP).sum(0)


def _on_host(index: SparseIndex) -> Any:
    """The same index in the host's memory."""
    held = (getattr(index, field.name) for field in fields(index))
    copied: list[Any] = [of.cpu() if isinstance(of, torch.Tensor) else of for of in held]
    return type(index)(*copied)
