# SPDX-License-Identifier: Apache-2.0
"""The remainder: the keys that a tile does not keep, to which its rows attend through summaries of boxes of keys.

A box is summarised by the mean and the variance of its keys and the mean of its values. docs/methods.md has the
equation, and what it gains.
"""

from dataclasses import dataclass

import torch

from minference_vllm.boxes import BOX

MAX_SUMMARIES = 512
"""Most summaries of a prompt. In longer prompts boxes are larger, so that a row's cost stays the same."""

SPREAD = 0.375
"""How much of the variance of a box's scores is added to their mean. Half of it would be right if the scores of the
keys left in a box were distributed normally; but the heaviest of them are kept."""

LARGEST = 65504.0
"""The largest number of float16, in which summaries are stored."""


def keys_per_box(seq_len: int) -> int:
    """Keys in a box of a prompt of this length: BOX, doubled until MAX_SUMMARIES are enough for all keys."""
    keys = BOX
    while seq_len > keys * MAX_SUMMARIES:
        keys *= 2
    return keys


@dataclass(frozen=True, slots=True)
class Summaries:
    """Summaries of a request's boxes, all [>= num_kv_heads, max_boxes, head_dim] float16.

    Attributes:
        keys: mean of the keys of each box.
        spreads: variance of its keys, by dimension.
        values: mean of its values.
    """

    keys: torch.Tensor
    spreads: torch.Tensor
    values: torch.Tensor

    @classmethod
    def allocate(cls, num_kv_heads: int, max_seq_len: int, head_dim: int, device: torch.device) -> "Summaries":
        """Room for a request of `max_seq_len` keys, and for all shorter ones."""
        shape = (num_kv_heads, min(-(-max_seq_len // BOX), MAX_SUMMARIES), head_dim)
        return cls(*(torch.zeros(shape, dtype=torch.float16, device=device) for _ in range(3)))
