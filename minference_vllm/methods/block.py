# SPDX-License-Identifier: Apache-2.0
"""Block: each half of a tile keeps the groups of 16 keys with most of its attention, estimated from means of 4 keys.

A few rows of each half are scored against means of keys. FlexPrefill (arXiv 2502.20766) scores means of queries against
means of keys; here the means are finer, and the rows are the half's own. The weight of a mean is its exponentiated
score divided by the sum of those of the row's own tile and the first keys, limited to a quarter of that sum. The sum
needs few means and is known beforehand, so one pass over all means is enough. Weights are partly squared before those
of all rows are added up, so that a group that a single row looks at counts. The lightest groups are dropped, about as
much of the attention as the setting `share` allows, and less where they are heavy; the first keys and those just before
the tile are always kept. In long prompts means of 32 keys are scored first, and means of 4 only in boxes of 128 keys
that may matter. docs/methods.md has the measurements.
"""

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from pydantic import Field

from minference_vllm import ops
from minference_vllm.boxes import BOX, LISTS, Boxes
from minference_vllm.chunk import Chunk
from minference_vllm.index import GROUP, GROUPS_PER_TILE, TILE, TileIndex
from minference_vllm.kernels.tape import act
from minference_vllm.methods.base import MAX_TOKENS, Method, MethodSettings
from minference_vllm.methods.block_scratch import (
    ALIKE,
    BlockBuffers,
    BlockScratch,
    CoarseBuffers,
    Heads,
    Shapes,
    allocate,
    rounded,
    shapes_of,
    turns,
)
from minference_vllm.ops import Kernel
from minference_vllm.scratch import LIST_BYTES, ScratchShape

LONG_FROM, COARSE_FROM = 32_768, 524_288
"""Defaults of `long_from` and `coarse_from`."""

LAST_PART_MOST = 512
"""The most query rows that `last_part` has attend to all keys: as many as were measured (docs/methods.md)."""


class BlockSettings(MethodSettings):
    """Settings of `block`. Units are tokens unless a field says otherwise."""

    name: Literal["block"] = "block"

    rows_per_half: Literal[16, 32, 64] = 32
    """How many query rows of every 64 choose the keys for all 64. The cost of choosing grows with this number."""

    share: float = Field(default=0.835, gt=0, le=1)
    """Share of the estimated attention that each head keeps, for every rows_per_list rows: more where the groups that
    would be dropped next are heavy, less where they are light. The keys of the rows' own tile of 128 and those that are
    always kept count towards it. No unit. With 1, every group of keys with any estimated attention is kept."""

    rows_per_list: Literal[64, 128] = 128
    """Query rows that keep the same groups. With 64, each half of a tile has a list of its own: fewer pairs are kept,
    but keys that one half alone keeps are loaded for 64 rows instead of 128."""

    sink_tokens: int = Field(default=64, ge=0, le=MAX_TOKENS)
    """First keys of the prompt that are always kept, rounded up to groups of 16."""

    local_tokens: int = Field(default=128, ge=0, le=MAX_TOKENS)
    """Keys just before a tile that are always kept, beside the tile's own; rounded up to groups of 16."""

    last_tokens: int = Field(default=64, ge=0, le=MAX_TOKENS)
    """At least how many query rows at the end of a prompt attend to all keys; the other rows of their tiles of 128 do
    too. A prompt's question stands there, and the few of its rows that look up a single far key have little weight in
    the choice for a whole tile. With 0 all rows choose."""

    last_part: float = Field(default=0.002, ge=0, le=1)
    """The part of a prompt's rows, at its end, that attend to all keys, if these are more than last_tokens; but no more
    than 512 rows. No unit. The default adds less than half a percent of all pairs: 262 rows of 131,072."""

    long_from: int = Field(default=LONG_FROM, ge=0, le=MAX_TOKENS)
    """Rows with fewer keys than this before them keep more of these, since attention takes only a small part of a short
    prompt's time. At 0 the length of a prompt makes no difference."""

    score_dtype: Literal["auto", "fp8", "model"] = "auto"
    """The dtype to which means of keys, and the rows that choose, are rounded. "model" is the model's dtype. "auto" is
    FP8 (e4m3) where that makes scores faster, which is on H100 and H200 with heads of 128, and else the model's dtype.
    "fp8" is FP8 in every case: on other GPUs and with other heads it leads to the same choice, but no faster, and on a
    GPU of compute capability below 8.9 the server refuses it at start."""

    coarse_from: int = Field(default=COARSE_FROM, ge=0, le=MAX_TOKENS)
    """Once context and chunk together reach this length, rows are scored against means of 32 keys first. The lightest
    boxes of 128 keys are then dropped, as long as they hold at most a quarter of the attention that a head may drop,
    and rows are scored against means of 4 keys in the other boxes only."""

    max_fine: float = Field(default=0.75, gt=0, le=1)
    """At most this share of the boxes before the chunk's last tile is scored against means of 4 keys: the heaviest of
    them. No unit."""

    max_density: float = Field(default=0.5, gt=0, le=1)
    """A tile keeps all groups if its halves together want more than this share of the groups before the chunk's last
    tile. No unit. The lists of groups are sized by it: at 0.5 and 131,072 tokens they take 16 KiB for each head and
    tile. All lists together take at most 256 MiB, which lowers the share in longer prompts: with 32 heads and chunks of
    16,384 tokens it is below 0.5 from 524,288 tokens on."""


class Block(Method):
    """Groups of each half of a tile by the estimated attention mass of some of its rows, until a share is reached."""

    Settings = BlockSettings

    def __init__(self, settings: BlockSettings, kernel: Kernel) -> None:
        super().__init__(settings, kernel)
        self.sink_groups = -(-settings.sink_tokens // GROUP)
        self.local_groups = -(-settings.local_tokens // GROUP)
        self.sink_boxes = max(1, -(-settings.sink_tokens // BOX))
        self.local_boxes = -(-settings.local_tokens // BOX)

    def scratch(self, shape: ScratchShape, device: torch.device) -> BlockScratch:
        heads, groups = shape.num_qo_heads, -(-shape.max_seq_len // TILE) * GROUPS_PER_TILE
        # A chunk may begin with the last row of a tile.
        tiles = min((shape.max_chunk + TILE - 2) // TILE + 1, groups // GROUPS_PER_TILE)
        fits = LIST_BYTES // (4 * heads * tiles) // ALIKE * ALIKE
        listed = max(ALIKE, min(rounded(self.max_kept(groups)), fits))
        index = TileIndex(
            groups=torch.zeros(heads, tiles, listed, dtype=torch.int32, device=device),
            counts=torch.zeros(heads, rounded(tiles), 3, dtype=torch.int32, device=device),
        )
        means_dtype = ops.means_dtype(self.settings.score_dtype, shape, self.kernel, device)
        of_turns = [
            self._shapes(turn, shape.head_dim, shape.max_seq_len, tiles) for turn in turns(heads, shape.num_kv_heads)
        ]
        return allocate(of_turns, means_dtype, index)

    def _shapes(self, heads: Heads, head_dim: int, seq_len: int, tiles: int) -> Shapes:
        """The buffers that choosing takes for some heads of a chunk."""
        settings = self.settings
        max_boxes = self.max_boxes(-(-seq_len // BOX)) if seq_len >= settings.coarse_from else 0
        return shapes_of(heads, head_dim, settings.rows_per_half, seq_len, tiles, max_boxes)

    def buffers(self, chunk: Chunk, scratch: BlockScratch) -> BlockBuffers:
        """The part of the scratch that a chunk uses, for as many of its heads at once as there is room for.

        Raises:
            ValueError: there is no room even for one head.
        """
        for heads in turns(chunk.num_qo_heads, chunk.kv.num_kv_heads):
            shapes = self._shapes(heads, chunk.head_dim, chunk.seq_len, chunk.num_tiles)
            if scratch.has_room(shapes):
                return scratch.divide(shapes)
        raise ValueError(
            f"scratch has no room for {chunk.num_rows} rows of a prompt of {chunk.seq_len} tokens: it was made for "
            "shorter ones"
        )

    def budgets(self, num_qo_heads: int, device: torch.device) -> torch.Tensor:
        """[num_qo_heads] float32: the share of each head."""
        return torch.full((num_qo_heads,), self.settings.share, dtype=torch.float32, device=device)

    def choose(self, chunk: Chunk, budgets: torch.Tensor, scratch: BlockScratch) -> TileIndex:
        """See Method.choose."""
        cap = self.max_kept((chunk.first_tile + chunk.num_tiles - 1) * GROUPS_PER_TILE)
        choosing = chunk.of_rows(0, self.choosing_rows(chunk))
        index = TileIndex(
            groups=scratch.index.groups[:, : chunk.num_tiles, :cap],
            counts=scratch.index.counts[:, : chunk.num_tiles],
            long_tiles=chunk.num_tiles - choosing.num_tiles,
        )
        if choosing.num_rows < chunk.num_rows:
            act(partial(index.counts[:, choosing.num_tiles :].copy_, scratch.every_group))
        if choosing.num_rows:
            self._choose_in_turns(choosing, budgets, self.buffers(chunk, scratch), index)
        return index

    def choosing_rows(self, chunk: Chunk) -> int:
        """See Method.choosing_rows: whole tiles, up to the one in which the prompt's last rows begin."""
        last = self.last_rows(chunk.seq_len) if chunk.may_end_prompt else 0
        end = (chunk.seq_len - last) // TILE * TILE if last else chunk.seq_len
        return max(end - chunk.context_len, 0)

    def last_rows(self, seq_len: int) -> int:
        """How many rows at the end of a prompt of so many tokens attend to all keys."""
        least = self.settings.last_tokens
        return max(least, min(int(seq_len * self.settings.last_part), LAST_PART_MOST)) if least else 0

    def _choose_in_turns(self, chunk: Chunk, budgets: torch.Tensor, buffers: BlockBuffers, index: TileIndex) -> None:
        num_heads = len(buffers.masses)
        for first in range(0, chunk.num_qo_heads, num_heads):
            heads, part = slice(first, first + num_heads), chunk.of_heads(first, num_heads)
            # Turns whose heads share a KV head use the same means: only the first of them computes these.
            if first % chunk.group_size == 0:
                self._average_keys(part, buffers)
            self._choose_at_once(part, budgets[heads], buffers, TileIndex(index.groups[heads], index.counts[heads]))

    def _average_keys(self, chunk: Chunk, buffers: BlockBuffers) -> None:
        ops.key_means(chunk.kv, chunk.seq_len, buffers.means, self.kernel)
        if buffers.coarse is not None:
            ops.coarse_means(buffers.means, chunk.seq_len, buffers.coarse.means, self.kernel)

    def _choose_at_once(self, chunk: Chunk, budgets: torch.Tensor, buffers: BlockBuffers, index: TileIndex) -> None:
        """Write the lists for all heads of a chunk; the means of their keys must have been computed."""
        settings, kernel, means, masses = self.settings, self.kernel, buffers.means, buffers.masses
        groups = (self.sink_groups, self.local_groups, settings.long_from // GROUP)
        by_tile = settings.rows_per_list == TILE
        ops.row_normalisers(chunk, means, buffers.row_lse, kernel)
        boxes = None
        if buffers.coarse is not None:
            boxes = self._choose_boxes(chunk, budgets, buffers.row_lse, buffers.coarse, masses)
        ops.group_masses(chunk, means, buffers.row_lse, masses, kernel, boxes)
        ops.select_groups(masses, chunk, budgets, settings.rows_per_half, *groups, by_tile, index, kernel)

    def _choose_boxes(
        self, chunk: Chunk, budgets: torch.Tensor, row_lse: torch.Tensor, coarse: CoarseBuffers, masses: torch.Tensor
    ) -> Boxes:
        """The boxes that are scored finely; in `masses` the codes of groups in all other boxes are set to 0."""
        ops.box_masses(chunk, coarse.means, row_lse, coarse.masses, self.kernel)
        room = self.max_boxes(chunk.first_tile + chunk.num_tiles - 1)
        boxes = replace(coarse.boxes, numbers=coarse.boxes.numbers[:, :, :room])
        forced, rows = (self.sink_boxes, self.local_boxes), self.settings.rows_per_half
        ops.select_boxes(coarse.masses, chunk, budgets, rows, *forced, boxes, masses, self.kernel)
        return boxes

    def max_boxes(self, num_boxes: int) -> int:
        """How many boxes a block of lists may score finely if `num_boxes` lie before its last tile.

        Boxes that are always kept have room. A block has at most LISTS tiles, and each tile has one more box before it
        than the one before, so these are up to LISTS more boxes than for one tile.
        """
        return max(int(num_boxes * self.settings.max_fine), min(self.sink_boxes + self.local_boxes, num_boxes) + LISTS)

    def prompt_lengths(self, shape: ScratchShape) -> tuple[int, ...]:
        """See Method.prompt_lengths."""
        shortest, coarse_from = max(super().prompt_lengths(shape)), self.settings.coarse_from
        return (shortest, coarse_from) if shortest < coarse_from <= shape.max_seq_len else (shortest,)

    def max_kept(self, num_groups: int) -> int:
        """How many groups a tile may list if `num_groups` lie before it; groups that are always kept have room."""
        wanted = max(int(num_groups * self.settings.max_density), self.sink_groups + self.local_groups)
        return max(1, min(wanted, num_groups))
