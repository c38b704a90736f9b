# SPDX-License-Identifier: Apache-2.0
"""The heaviest entries of a row of masses, by a stable sort."""

import torch

from minference_vllm.scratch import SELECT_BINS, SelectBuffers


def weights(mass: torch.Tensor, forced: torch.Tensor) -> torch.Tensor:
    """Masses as they are compared, [num_heads, length] int32: to seven significant bits, forced ones the heaviest.

    Seven bits distinguish masses that differ by 1.6%, which is much less than the error of an estimate from 64 rows.
    Few enough different weights are left for one histogram to find the threshold.
    """
    weight = ((mass.float().view(torch.int32) >> 17) - 8127).clamp(min=0)
    is_forced = torch.arange(mass.shape[1], device=mass.device) < forced[:, None]
    return weight.masked_fill_(is_forced, SELECT_BINS - 1)


def select(
    mass: torch.Tensor,
    length: int,
    keep: torch.Tensor,
    forced: torch.Tensor,
    indptr: torch.Tensor,
    grain: int,
    out: torch.Tensor | None,
    buffers: SelectBuffers,
) -> None:
    """Keep the heaviest of the first `length` entries of each row; ties go to the smaller index.

    Args:
        mass: [num_heads, >= length] int32, 0 .. 2^30.
        length: entries that count.
        keep: [num_heads] int32, how many entries of each row are kept, at most `length` and the width of `out`.
        forced: [num_heads] int32: how many first entries of each row come before all others.
        indptr: [num_heads, num_marks] int32, written: how many kept entries are smaller than grain * j;
            num_marks * grain >= length.
        grain: spacing of `indptr`.
        out: [num_heads, max_keep] int32, written: the kept entries, ascending; None if not wanted.
        buffers: scratch of the kernel.
    """
    heaviest = weights(mass[:, :length], forced).argsort(dim=1, descending=True, stable=True)
    edges = torch.arange(indptr.shape[1], device=mass.device, dtype=torch.int64) * grain
    for head, limit in enumerate(keep.clamp(max=length if out is None else min(length, out.shape[1])).tolist()):
        kept = heaviest[head, :limit].sort().values
        if out is not None:
            out[head, :limit] = kept.to(torch.int32)
        indptr[head] = torch.searchsorted(kept, edges, out_int32=True)
