# SPDX-License-Identifier: Apache-2.0
"""How many of the heaviest entries hold a share of a row's mass."""

import torch

from minference_vllm.reference.select import weights
from minference_vllm.scratch import SELECT_BINS, SelectBuffers


def largest_masses(device: torch.device) -> torch.Tensor:
    """[SELECT_BINS] int64: upper bounds of the masses of each weight, see select.weights; exact below 2^24."""
    heavier = torch.arange(1, SELECT_BINS + 1, dtype=torch.int32, device=device)
    return ((heavier + 8127) << 17).view(torch.float32).ceil().long() - 1


def share_sizes(
    mass: torch.Tensor,
    length: int,
    share: torch.Tensor,
    forced: torch.Tensor,
    max_keep: int,
    keep: torch.Tensor,
    buffers: SelectBuffers,
) -> None:
    """Count the heaviest of the first `length` entries of each row that `select` must keep to hold a share of the mass.

    The others are dropped, the lightest first, of one weight all or none, as long as the dropped entries hold at most 1
    - share of the row's mass. A dropped entry counts with the largest mass of its weight, up to 1/64 more than its own.
    So the kept entries do hold the share, and only the number of entries of each weight must be known.

    Args:
        mass: [num_heads, >= length] int32, 0 .. 2^30.
        length: entries that count.
        share: [num_heads] float32, above 0. With 1 all entries that have mass are kept.
        forced: [num_heads] int32: how many first entries of each row are never dropped; their mass counts.
        max_keep: most entries that are kept in a row, even if they hold less than the share.
        keep: [num_heads] int32, written. Of a row without mass only the forced entries are kept.
        buffers: scratch of the kernel.
    """
    weight = weights(mass[:, :length], forced).long()
    count = torch.zeros(len(mass), SELECT_BINS, dtype=torch.int64, device=mass.device)
    count.scatter_add_(1, weight, torch.ones_like(weight))
    allowed = ((1 - share.double()) * mass[:, :length].sum(1, dtype=torch.int64)).long()
    # By weight: the mass that is dropped if all entries of this weight and of smaller ones are.
    dropped = (count * largest_masses(mass.device)).cumsum(1)
    kept = dropped > allowed[:, None]
    kept[:, -1] = True  # the forced entries' weight
    keep.copy_((count * kept).sum(1).clamp(max=max_keep))
