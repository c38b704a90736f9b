# SPDX-License-Identifier: Apache-2.0
"""The heaviest entries of a row of masses, by a stable sort."""

import torch

from minference_vllm.workspace import SELECT_BINS, Workspace


def weights(mass: torch.Tensor, forced: int) -> torch.Tensor:
    """Masses as they are compared, [num_heads, length] int32: to seven significant bits, forced ones the heaviest.

    Seven bits tell apart what differs by 1.6%, far finer than an estimate from 64 rows is true; in return one histogram
    finds the threshold.
    """
    weight = ((mass.float().view(torch.int32) >> 17) - 8127).clamp(min=0)
    weight[:, :forced] = SELECT_BINS - 1
    return weight


def select(
    mass: torch.Tensor,
    length: int,
    keep: int,
    forced: int,
    below: torch.Tensor,
    grain: int,
    out: torch.Tensor | None,
    ws: Workspace,
) -> None:
    """Keep the `keep` heaviest of the first `length` entries of each row; ties go to the smaller index.

    Args:
        mass: [num_heads, >= length] int32, 0 .. 2^30.
        length: entries that count, at least `keep`.
        keep: how many are kept.
        forced: the first entries, this many, come before all others.
        below: [num_heads, num_below] int32, written: kept entries smaller than grain * j; num_below * grain >= length.
        grain: spacing of `below`.
        out: [num_heads, >= keep] int32, written: the kept entries, ascending; None if not wanted.
        ws: scratch of the kernel.
    """
    heaviest = weights(mass[:, :length], forced).argsort(dim=1, descending=True, stable=True)
    kept = heaviest[:, :keep].sort(1).values.to(torch.int32)
    if out is not None:
        out[:, :keep] = kept
    edges = (torch.arange(below.shape[1], device=mass.device, dtype=torch.int32) * grain).expand(len(mass), -1)
    below.copy_(torch.searchsorted(kept, edges.contiguous(), out_int32=True))
