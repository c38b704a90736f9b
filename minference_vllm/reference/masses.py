# SPDX-License-Identifier: Apache-2.0
"""How much attention each part of a half gives to each group before the tile, estimated from means of keys."""

import math

import torch

from minference_vllm.boxes import GROUPS_PER_BOX, LISTS, MEANS_PER_GROUP, Boxes
from minference_vllm.chunk import Chunk
from minference_vllm.index import HALVES, TILE
from minference_vllm.reference.codes import encode
from minference_vllm.reference.normalisers import PART, sampled_rows
from minference_vllm.reference.operands import from_operand, query_rows
from minference_vllm.reference.quantized import score_scales
from minference_vllm.scratch import MEAN

SQUARED = 31 / 32
"""How much of a group's mass are squares of its means' weights, where these are at their limit.

A square makes a group heavy that a single row looks at. The rest, plain weights, makes heavy what all rows give a
little of. docs/methods.md has what either alone, and other mixtures, lose.
"""


OCTAVES, STEPS, UNIT = 20, 1024, 32
"""Of stored weights: octaves below the largest, steps of an octave, and what a weight of 1 is stored as."""

CENTRE = 0.0573
"""The mean of log2(1 + f) - f for 0 <= f < 1."""


def mean_weights(x: torch.Tensor) -> torch.Tensor:
    """2^x to 4%, as fast kernels compute it: the bits of a number in fp16 are a linear function of its logarithm.

    With n whole and 0 <= f < 1, these bits give 2^n (1 + f) for 2^(n + f), after CENTRE has been taken from x. A weight
    is stored in fp16, times UNIT: down to 2^(1 - OCTAVES) as a normal number, and in the octave below on a straight
    line to 0. So weights below 2^-OCTAVES are 0.

    Args:
        x: any shape, float32; what is above CENTRE counts as CENTRE, so that no weight exceeds 1.
    """
    y = ((x - CENTRE) / OCTAVES + 1).clamp(0, 1)
    return (y * (OCTAVES * STEPS)).round().to(torch.int16).view(torch.float16).float() / UNIT


def squared_for(mean: int) -> float:
    """SQUARED for means of groups, and 0 for the coarser means of boxes, whose masses are sums of plain weights.

    A mean of 32 keys hides a lone key, and its square would hide it further.
    """
    return SQUARED if mean == MEAN else 0.0


def group_masses(
    chunk: Chunk,
    means: torch.Tensor,
    row_lse: torch.Tensor,
    masses: torch.Tensor,
    mean: int = MEAN,
    boxes: Boxes | None = None,
) -> None:
    """Sum w (1 - s + s w) over a part's rows and a group's means, for weights w and s = squared_for(mean).

    A mean's weight is exp(score - normaliser), to 4% (mean_weights), times the number of its keys, and at most 1, which
    is LIMIT of what the row's normaliser includes. Otherwise a row that attends to a far key, which its normaliser does
    not include, could outweigh all other rows by any factor.

    All groups lie before the tile, so every row sees them and no causal mask is needed. Masses are summed by part, not
    by half, so that the number of scores that a kernel holds at once does not grow with rows_per_half.

    Args:
        chunk: its queries are read.
        means: [num_kv_heads, >= first key of the last tile / mean, head_dim], see key_means. Where they are FP8, rows
            are rounded to it too, as for their normalisers.
        row_lse: [num_qo_heads, >= num_tiles * HALVES, rows_per_half] float32, see row_normalisers.
        masses: [>= num_qo_heads, >= num_tiles * HALVES * parts of a half, >= groups before the last tile] uint8,
            written: codes of the groups before each part's tile; codes from the tile on are undefined. A half has
            rows_per_half / PART parts.
        mean: keys in a mean: MEAN, or BOX_MEAN for the masses of boxes in place of groups; see squared_for.
        boxes: if not None, only groups in the boxes of a part's block are scored. For other groups nothing is written.
    """
    rows_per_half, squared = row_lse.shape[2], squared_for(mean)
    parts_per_tile = HALVES * rows_per_half // PART
    scales = score_scales(chunk)[:, None]
    lse_of_parts = row_lse.view(len(row_lse), -1, PART)
    for part, rows in enumerate(sampled_rows(chunk, rows_per_half).view(-1, PART)):
        tile_start = (chunk.first_tile + part // parts_per_tile) * TILE
        # A half that the chunk has no rows of may take any row: its normaliser is infinite, so its masses are 0.
        q = query_rows(chunk.q[rows.clamp(min=chunk.context_len) - chunk.context_len], means) * scales
        for head in range(chunk.num_qo_heads):
            scores = q[:, head] @ from_operand(means[head // chunk.group_size, : tile_start // mean]).T
            # [PART, means]
            weight = mean_weights((scores - lse_of_parts[head, part, :, None]) / math.log(2) + math.log2(mean))
            mass = weight * (1 - squared + squared * weight)
            code = encode(mass.sum(0).unflatten(0, (-1, MEANS_PER_GROUP)).sum(1))
            looked_at: torch.Tensor | slice = slice(len(code))
            if boxes is not None:
                looked_at = groups_in_boxes(boxes, part, head, chunk.group_size, len(code))
            masses[head, part, looked_at] = code[looked_at]


def groups_in_boxes(boxes: Boxes, part: int, head: int, group_size: int, num_groups: int) -> torch.Tensor:
    """Groups before `num_groups` in the boxes of a part's block, int64."""
    number, block = head // group_size, (part * group_size + head % group_size) // LISTS
    listed = boxes.numbers[number, block, : boxes.counts[number, block]].long()
    groups = (listed[:, None] * GROUPS_PER_BOX + torch.arange(GROUPS_PER_BOX, device=listed.device)).flatten()
    return groups[groups < num_groups]
