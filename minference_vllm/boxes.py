# SPDX-License-Identifier: Apache-2.0
"""Boxes of keys: coarse means tell which of them may matter, and only in these are fine means scored."""

from dataclasses import dataclass

import torch

from minference_vllm.index import GROUPS_PER_TILE, TILE

BOX = TILE
"""Keys in a box, which starts at an absolute multiple of BOX: a whole number of boxes lies before each tile."""

GROUPS_PER_BOX = GROUPS_PER_TILE

MEANS_PER_GROUP = 4
"""Means in a group, and coarse means in a box: their masses are added up to that of the group or box."""

BOX_MEAN = BOX // MEANS_PER_GROUP
"""Keys in a coarse mean."""

COARSE_AT_ONCE = 32
"""Coarse means that are read at once. Buffers hold a multiple of this; their last ones may hold anything."""

LISTS = 16
"""How many lists (see reference.normalisers.PART) form a block; all lists of a block score the same boxes.

Lists are counted part by part, and within a part head by head, over the heads that share a KV head.
"""


@dataclass(frozen=True, slots=True)
class Boxes:
    """Which boxes each block of lists scores finely.

    Attributes:
        numbers: [>= num_kv_heads, >= blocks, max_boxes] int32, ascending; valid up to the block's count.
        counts: [>= num_kv_heads, >= blocks] int32.
        thresholds: [>= num_qo_heads, >= parts] int32, scratch: the smallest code with which each part wants a box.
    """

    numbers: torch.Tensor
    counts: torch.Tensor
    thresholds: torch.Tensor
