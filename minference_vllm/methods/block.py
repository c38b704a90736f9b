# SPDX-License-Identifier: Apache-2.0
"""Block: for each half of a tile the 16-key groups that hold a share of its attention, estimated from means of 4 keys.

A few rows of each half are scored against means of keys, as FlexPrefill (arXiv 2502.20766) scores means of queries, but
with finer means and with rows of the half itself. What counts is a score beside those of the row's own tile and the
first keys, at most as much as all of them: one pass over the means. The lightest groups are dropped while what is left
holds the share; the first keys and those just before the tile always stay. In long prompts means of 32 keys are scored
first, and those of 4 only in boxes of 128 keys that may matter. docs/methods.md has what was measured.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field

from minference_vllm import ops
from minference_vllm.boxes import BOX, BOX_MEAN, COARSE_AT_ONCE, LISTS, Boxes
from minference_vllm.chunk import Chunk
from minference_vllm.index import GROUP, GROUPS_PER_TILE, HALVES, TILE, TileIndex
from minference_vllm.methods.base import MAX_TOKENS, Method, MethodSettings
from minference_vllm.ops import Kernel
from minference_vllm.reference.normalisers import PART
from minference_vllm.scratch import LIST_BYTES, MASS_BYTES, MEAN, ScratchShape

COARSE_FROM = 131_072
"""Default of `coarse_from`."""


class BlockSettings(MethodSettings):
    """Settings of `block`. Units are tokens unless a field says otherwise."""

    name: Literal["block"] = "block"

    rows_per_half: Literal[16, 32, 64] = 32
    """Query rows of every 64 that choose the keys of all 64. The cost of choosing grows with them."""

    share: float = Field(default=0.84, gt=0, le=1)
    """Share of the estimated attention that each head keeps for each half of a tile, the tile itself and what is always
    kept included. No unit. With 1, all that has any mass is kept."""

    rows_per_list: Literal[64, 128] = 128
    """Query rows that keep the same groups. With 64, each half of a tile has a list of its own: fewer pairs are kept,
    but keys that one half alone keeps are loaded for 64 rows instead of 128."""

    sink_tokens: int = Field(default=64, ge=0, le=MAX_TOKENS)
    """First keys of the prompt that are always kept, rounded up to groups of 16."""

    local_tokens: int = Field(default=128, ge=0, le=MAX_TOKENS)
    """Keys just before a tile that are always kept, beside the tile's own; rounded up to groups of 16."""

    score_dtype: Literal["auto", "fp8", "model"] = "auto"
    """What means of keys and the rows that choose are rounded to: "model" is the model's dtype, "auto" FP8 (e4m3) where
    scores are faster in it, which is on H100 and H200 for heads of 128, and else the model's. "fp8" asked for elsewhere
    gives the same choice no faster; GPUs older than compute capability 8.9 cannot, and refuse it at start."""

    coarse_from: int = Field(default=COARSE_FROM, ge=0, le=MAX_TOKENS)
    """From prompts of this length on, rows are scored against means of 32 keys first, and against those of 4 only in
    boxes of 128 keys that these leave: all but those that together have a quarter of the mass that a head may drop."""

    max_fine: float = Field(default=0.75, gt=0, le=1)
    """Of the boxes before the chunk's last tile, no more than this share is scored finely: the heaviest. No unit."""

    max_density: float = Field(default=0.5, gt=0, le=1)
    """A tile whose halves together want more than this share of the groups before the chunk's last tile keeps all
    groups. No unit. It sizes the lists: at 0.5 and 131,072 tokens they take 16 KiB for each head and tile. In all they
    take 256 MiB at the most, which with 32 heads and chunks of 16,384 is less than half from 524,288 tokens on."""


@dataclass(frozen=True, slots=True)
class CoarseBuffers:
    """Scratch of `block` for prompts that are scored coarsely first.

    Attributes:
        means: [num_kv_heads, max_coarse_means, head_dim], see ops.coarse_means.
        masses: [num_heads_at_once, max_parts, max_boxes] uint8, see ops.box_masses.
        boxes: what is left to be scored finely, see ops.select_boxes.
    """

    means: torch.Tensor
    masses: torch.Tensor
    boxes: Boxes


@dataclass(frozen=True, slots=True)
class BlockBuffers:
    """Scratch of `block`.

    Attributes:
        means: [num_kv_heads, max_means, head_dim] in the dtype of the scores, see ops.means_dtype and ops.key_means.
        row_lse: [num_qo_heads, max_halves, rows_per_half] float32, see ops.row_normalisers.
        masses: [num_heads_at_once, max_parts, max_groups] uint8, see ops.group_masses.
        index: what `choose` returns a part of.
        coarse: None if no prompt is long enough.
    """

    means: torch.Tensor
    row_lse: torch.Tensor
    masses: torch.Tensor
    index: TileIndex
    coarse: CoarseBuffers | None


class Block(Method):
    """Groups of each half of a tile by the estimated attention mass of some of its rows, until a share is reached."""

    Settings = BlockSettings

    def __init__(self, settings: BlockSettings, kernel: Kernel) -> None:
        super().__init__(settings, kernel)
        self.sink_groups = -(-settings.sink_tokens // GROUP)
        self.local_groups = -(-settings.local_tokens // GROUP)
        self.sink_boxes = max(1, -(-settings.sink_tokens // BOX))
        self.local_boxes = -(-settings.local_tokens // BOX)

    def scratch(self, shape: ScratchShape, device: torch.device) -> BlockBuffers:
        heads = shape.num_qo_heads
        length = -(-shape.max_seq_len // TILE) * TILE
        # A chunk may begin with the last row of a tile.
        tiles = min((shape.max_chunk + TILE - 2) // TILE + 1, length // TILE)
        groups = length // GROUP
        # Rows of codes start on multiples of 16 bytes, the widest load.
        codes = -(-groups // 16) * 16
        rows = self.settings.rows_per_half
        parts = tiles * HALVES * rows // PART
        group_size = heads // shape.num_kv_heads
        at_once = heads_at_once(heads, group_size, parts * codes)
        listed = max(1, min(self.max_kept(groups), LIST_BYTES // (4 * heads * tiles)))
        means_dtype = ops.means_dtype(self.settings.score_dtype, shape, self.kernel, device)

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        def make_coarse() -> CoarseBuffers:
            sets, blocks = -(-at_once * shape.num_kv_heads // heads), -(-parts * min(at_once, group_size) // LISTS)
            numbers = zeros(sets, blocks, self.max_boxes(length // BOX))
            left_out = zeros(at_once, parts, dtype=torch.int64)
            boxes = Boxes(numbers, zeros(sets, blocks), zeros(at_once, parts), left_out)
            num_means = -(-length // BOX_MEAN // COARSE_AT_ONCE) * COARSE_AT_ONCE
            means = zeros(shape.num_kv_heads, num_means, shape.head_dim, dtype=means_dtype)
            return CoarseBuffers(means, zeros(at_once, parts, -(-length // BOX // 16) * 16, dtype=torch.uint8), boxes)

        return BlockBuffers(
            means=zeros(shape.num_kv_heads, length // MEAN, shape.head_dim, dtype=means_dtype),
            row_lse=zeros(heads, tiles * HALVES, rows, dtype=torch.float32),
            masses=zeros(at_once, parts, codes, dtype=torch.uint8),
            index=TileIndex(groups=zeros(heads, tiles, listed), counts=zeros(heads, tiles, 3)),
            coarse=make_coarse() if shape.max_seq_len >= self.settings.coarse_from else None,
        )

    def budgets(self, num_qo_heads: int, device: torch.device) -> torch.Tensor:
        """[num_qo_heads] float32: the share of each head."""
        return torch.full((num_qo_heads,), self.settings.share, dtype=torch.float32, device=device)

    def choose(self, chunk: Chunk, budgets: torch.Tensor, buffers: BlockBuffers) -> TileIndex:
        """See Method.choose."""
        settings, kernel, masses = self.settings, self.kernel, buffers.masses
        forced, by_tile = (self.sink_groups, self.local_groups), settings.rows_per_list == TILE
        cap = self.max_kept((chunk.first_tile + chunk.num_tiles - 1) * GROUPS_PER_TILE)
        index = TileIndex(
            groups=buffers.index.groups[:, : chunk.num_tiles, :cap], counts=buffers.index.counts[:, : chunk.num_tiles]
        )
        ops.key_means(chunk.kv, chunk.seq_len, buffers.means, kernel)
        ops.row_normalisers(chunk, buffers.means, buffers.row_lse, kernel)
        coarse = buffers.coarse if chunk.seq_len >= settings.coarse_from else None
        if coarse is not None:
            ops.coarse_means(buffers.means, chunk.seq_len, coarse.means, kernel)
        for first_head in range(0, chunk.num_qo_heads, len(masses)):
            boxes = None
            if coarse is not None:
                boxes = self._choose_boxes(chunk, budgets, first_head, buffers.row_lse, coarse, masses)
            ops.group_masses(chunk, buffers.means, buffers.row_lse, first_head, masses, kernel, boxes)
            ops.select_groups(
                masses, chunk, first_head, budgets, settings.rows_per_half, *forced, by_tile, index, kernel, boxes
            )
        return index

    def _choose_boxes(
        self,
        chunk: Chunk,
        budgets: torch.Tensor,
        first_head: int,
        row_lse: torch.Tensor,
        coarse: CoarseBuffers,
        masses: torch.Tensor,
    ) -> Boxes:
        """Boxes that the heads at once, from `first_head` on, score finely; codes of others are written to `masses`."""
        ops.box_masses(chunk, coarse.means, row_lse, first_head, coarse.masses, self.kernel)
        room = self.max_boxes(chunk.first_tile + chunk.num_tiles - 1)
        boxes = replace(coarse.boxes, numbers=coarse.boxes.numbers[:, :, :room])
        forced, rows = (self.sink_boxes, self.local_boxes), self.settings.rows_per_half
        ops.select_boxes(coarse.masses, chunk, first_head, budgets, rows, *forced, boxes, masses, self.kernel)
        return boxes

    def max_boxes(self, num_boxes: int) -> int:
        """Boxes that a block of lists may score finely if up to this many lie before its last tile.

        What is always kept has room: before each of the tiles that a block may have lies one box more.
        """
        return max(int(num_boxes * self.settings.max_fine), self.sink_boxes + self.local_boxes + LISTS)

    def prompt_lengths(self, shape: ScratchShape) -> tuple[int, ...]:
        """See Method.prompt_lengths."""
        shortest, coarse_from = max(super().prompt_lengths(shape)), self.settings.coarse_from
        return (shortest, coarse_from) if shortest < coarse_from <= shape.max_seq_len else (shortest,)

    def max_kept(self, num_groups: int) -> int:
        """Groups that a tile may list if up to this many lie before it: what is always kept has room."""
        wanted = max(int(num_groups * self.settings.max_density), self.sink_groups + self.local_groups)
        return max(1, min(wanted, num_groups))


def heads_at_once(num_qo_heads: int, group_size: int, bytes_each: int) -> int:
    """Heads whose masses MASS_BYTES hold: all of some KV heads, or an even share of one KV head's; one at the least."""
    limit = max(1, MASS_BYTES // bytes_each)
    if limit >= group_size:
        return min(limit // group_size * group_size, num_qo_heads)
    return max(count for count in range(1, limit + 1) if group_size % count == 0)
