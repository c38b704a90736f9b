# SPDX-License-Identifier: Apache-2.0
"""Boxes of keys that are scored by fine means, where coarse ones have said which may matter."""

from dataclasses import dataclass

import torch

from minference_vllm.index import GROUPS_PER_TILE, TILE

BOX = TILE
"""Keys in a box, on absolute positions: what lies before a tile is a whole number of them."""

GROUPS_PER_BOX = GROUPS_PER_TILE

MEANS_PER_GROUP = 4
"""Means whose masses are added to that of a group, and coarse means to that of a box."""

BOX_MEAN = BOX // MEANS_PER_GROUP
"""Keys in a coarse mean."""

COARSE_AT_ONCE = 32
"""Coarse means that are read at once: buffers of them hold a multiple of this, whatever stands in the last ones."""

LISTS = 16
"""Lists (see reference.normalisers.PART) that share the boxes of a block.

Lists are counted part by part, and within a part head by head, over the heads that share a KV head.
"""


@dataclass(frozen=True, slots=True)
class Boxes:
    """Which boxes each block of lists looks at more closely.

    Attributes:
        numbers: [>= num_kv_heads, >= blocks, max_boxes] int32, ascending; valid up to the block's count.
        counts: [>= num_kv_heads, >= blocks] int32.
        thresholds: [>= num_qo_heads, >= parts] int32, scratch: the least code of a box that each part wants.
        left_out: [>= num_qo_heads, >= parts] int64: mass that each part gives to the other boxes, in the units of
            reference.codes.weights.
    """

    numbers: torch.Tensor
    counts: torch.Tensor
    thresholds: torch.Tensor
    left_out: torch.Tensor
