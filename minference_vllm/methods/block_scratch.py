# SPDX-License-Identifier: Apache-2.0
"""The scratch of `block`, and how it is divided for the heads of a chunk that choose at the same time.

In the longest prompts the means and masses of all heads do not fit, so heads choose in turns. The number of heads in a
turn depends on the chunk: a server that accepts a million tokens still chooses for all heads at once if a prompt is
short.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from math import prod
from typing import NamedTuple

import torch

from minference_vllm.boxes import BOX, BOX_MEAN, COARSE_AT_ONCE, GROUPS_PER_BOX, LISTS, Boxes
from minference_vllm.index import EVERY_GROUP, GROUP, HALVES, TILE, TileIndex
from minference_vllm.reference.normalisers import PART
from minference_vllm.scratch import MASS_BYTES, MEAN

ALIKE = 16
"""Rows of scratch are multiples of this many elements. Triton compiles different variants of a kernel for strides that
are multiples of 16 and for others. If a prompt's length decided which one is needed, requests would have to wait while
a server compiles it."""


class Heads(NamedTuple):
    """Query heads that choose at the same time: all those of some KV heads, or an even share of one KV head's."""

    num_qo_heads: int
    num_kv_heads: int


@dataclass(frozen=True, slots=True)
class CoarseBuffers:
    """Buffers of `block` for prompts that are scored coarsely first.

    Attributes:
        means: [num_kv_heads, max_coarse_means, head_dim], see ops.coarse_means.
        masses: [num_qo_heads, max_parts, max_boxes] uint8, see ops.box_masses.
        boxes: the boxes that are to be scored finely, see ops.select_boxes.
    """

    means: torch.Tensor
    masses: torch.Tensor
    boxes: Boxes


@dataclass(frozen=True, slots=True)
class BlockBuffers:
    """Buffers of `block` for a chunk and the heads of one turn.

    Attributes:
        means: [num_kv_heads, max_means, head_dim] in the dtype of the scores, see ops.means_dtype and ops.key_means.
        row_lse: [num_qo_heads, max_halves, rows_per_half] float32, see ops.row_normalisers.
        masses: [num_qo_heads, max_parts, max_groups] uint8, see ops.group_masses.
        coarse: None if the prompt is not scored coarsely.
    """

    means: torch.Tensor
    row_lse: torch.Tensor
    masses: torch.Tensor
    coarse: CoarseBuffers | None


@dataclass(frozen=True, slots=True)
class Shapes:
    """Shapes of the buffers for a chunk and the heads of a turn. Coarse buffers are empty if they are not needed."""

    means: tuple[int, ...]
    row_lse: tuple[int, ...]
    masses: tuple[int, ...]
    coarse_means: tuple[int, ...]
    box_masses: tuple[int, ...]
    box_numbers: tuple[int, ...]
    box_counts: tuple[int, ...]
    box_thresholds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockScratch:
    """Scratch of `block`: flat tensors, except the index, of which `choose` returns a part.

    Attributes:
        index: of all heads.
        every_group: [3] int32, the counts of a tile that keeps all groups.
        means, .., box_thresholds: flat memory of the buffers that Shapes describes.
    """

    index: TileIndex
    every_group: torch.Tensor
    means: torch.Tensor
    row_lse: torch.Tensor
    masses: torch.Tensor
    coarse_means: torch.Tensor
    box_masses: torch.Tensor
    box_numbers: torch.Tensor
    box_counts: torch.Tensor
    box_thresholds: torch.Tensor

    def has_room(self, shapes: Shapes) -> bool:
        return all(prod(getattr(shapes, field.name)) <= getattr(self, field.name).numel() for field in fields(Shapes))

    def divide(self, shapes: Shapes) -> BlockBuffers:
        """The buffers of these shapes."""

        def take(name: str) -> torch.Tensor:
            sizes = getattr(shapes, name)
            return getattr(self, name)[: prod(sizes)].view(sizes)

        coarse = None
        if prod(shapes.coarse_means):
            boxes = Boxes(take("box_numbers"), take("box_counts"), take("box_thresholds"))
            coarse = CoarseBuffers(take("coarse_means"), take("box_masses"), boxes)
        return BlockBuffers(take("means"), take("row_lse"), take("masses"), coarse)


def rounded(size: int, to: int = ALIKE) -> int:
    return -(-size // to) * to


def shapes_of(heads: Heads, head_dim: int, rows_per_half: int, seq_len: int, tiles: int, max_boxes: int) -> Shapes:
    """The buffers that a chunk takes.

    Args:
        seq_len: keys of the request, the chunk's own included.
        tiles: how many tiles hold rows of the chunk.
        max_boxes: boxes that a block of lists may score finely; 0 if the prompt is not scored coarsely.
    """
    qo, kv = heads
    length, parts = rounded(seq_len, TILE), tiles * HALVES * rows_per_half // PART
    blocks, is_coarse = -(-parts * (qo // kv) // LISTS), int(max_boxes > 0)
    return Shapes(
        means=(kv, length // MEAN, head_dim),
        row_lse=(qo, tiles * HALVES, rows_per_half),
        # Also accessed in words, each of which holds the codes of one box.
        masses=(qo, parts, rounded(length // GROUP, ALIKE * GROUPS_PER_BOX)),
        coarse_means=(kv * is_coarse, rounded(length // BOX_MEAN, COARSE_AT_ONCE), head_dim),
        box_masses=(qo * is_coarse, parts, rounded(length // BOX)),
        box_numbers=(kv * is_coarse, blocks, rounded(max_boxes)),
        box_counts=(kv * is_coarse, rounded(blocks)),
        box_thresholds=(qo * is_coarse, rounded(parts)),
    )


def allocate(of_turns: Sequence[Shapes], means_dtype: torch.dtype, index: TileIndex) -> BlockScratch:
    """Scratch, zeroed, for the turn with most heads whose masses fit into MASS_BYTES in the longest prompt.

    Args:
        of_turns: the buffers of the longest prompt for every possible number of heads in a turn, the largest number
            first.
    """
    largest = next((shapes for shapes in of_turns if prod(shapes.masses) <= MASS_BYTES), of_turns[-1])
    # Buffers whose size does not depend on the prompt's length are small: they have room for all heads at once.
    everyone = of_turns[0]
    shapes = replace(
        largest,
        row_lse=everyone.row_lse,
        box_counts=everyone.box_counts,
        box_thresholds=everyone.box_thresholds,
    )
    dtypes = dict.fromkeys(("box_numbers", "box_counts", "box_thresholds"), torch.int32)
    dtypes |= {"means": means_dtype, "coarse_means": means_dtype, "row_lse": torch.float32}
    dtypes |= {"masses": torch.uint8, "box_masses": torch.uint8}
    made = {
        name: torch.zeros(prod(getattr(shapes, name)), dtype=dtype, device=index.groups.device)
        for name, dtype in dtypes.items()
    }
    every_group = torch.tensor([EVERY_GROUP, 0, 0], dtype=torch.int32, device=index.counts.device)
    return BlockScratch(index=index, every_group=every_group, **made)


def turns(num_qo_heads: int, num_kv_heads: int) -> Iterator[Heads]:
    """Possible sizes of a turn, the largest first: even shares of the KV heads, then of one KV head's query heads."""
    group_size = num_qo_heads // num_kv_heads
    for count in range(num_kv_heads, 0, -1):
        if count == -(-num_kv_heads // -(-num_kv_heads // count)):
            yield Heads(count * group_size, count)
    for count in range(group_size - 1, 0, -1):
        if group_size % count == 0:
            yield Heads(count, 1)
