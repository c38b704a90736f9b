# SPDX-License-Identifier: Apache-2.0
"""Attention of a chunk's probe rows over all keys, summed by column and by diagonal."""

import torch

from minference_vllm.index import PagedKV
from minference_vllm.reference.pages import gather
from minference_vllm.workspace import MASS_UNIT, Workspace


def probe_rows(num_rows: int, num_last: int, num_spread: int, device: torch.device) -> torch.Tensor:
    """[num_last + num_spread] rows of the chunk that are probed; negative where the chunk is too short to have them."""
    last = torch.arange(num_rows - num_last, num_rows, device=device)
    spread = torch.arange(1, num_spread + 1, device=device) * num_rows // max(num_spread, 1) - 1
    return torch.cat([last, spread])


def probe(
    q: torch.Tensor, kv: PagedKV, context_len: int, scale: float, num_last: int, num_spread: int, ws: Workspace
) -> None:
    """Fill ws.vertical, ws.slash and ws.probe_lse for one chunk (MInference, arXiv 2407.02490, algorithm 2).

    Args:
        q: [num_rows, num_qo_heads, head_dim], the chunk's queries.
        kv: the request's cache, the chunk's own keys already in it.
        context_len: keys before the chunk.
        scale: softmax scale.
        num_last, num_spread: how many probe rows are the chunk's last ones and how many lie evenly over it.

    Masses are integers, multiples of MASS_UNIT, so that their sums are exact and the same in any order of adding.
    """
    num_rows, num_qo_heads, _ = q.shape
    seq_len = context_len + num_rows
    keys, _ = gather(kv, seq_len)
    group = num_qo_heads // keys.shape[0]
    rows = probe_rows(num_rows, num_last, num_spread, q.device)
    positions = context_len + rows
    # [probe_rows, seq_len]
    distance = positions[:, None] - torch.arange(seq_len, device=q.device)
    visible = (distance >= 0) & (rows >= 0)[:, None]
    diagonal = distance.clamp(min=0).flatten()
    for head in range(num_qo_heads):
        scores = q[rows.clamp(min=0), head].float() @ keys[head // group].float().T * scale
        scores = scores.masked_fill(~visible, -torch.inf)
        lse = scores.logsumexp(-1)
        mass = (scores - lse[:, None]).exp().where(visible, 0.0)
        mass = (mass / MASS_UNIT).round().to(torch.int32)
        ws.probe_lse[head, : len(rows)] = lse
        ws.vertical[head, :seq_len] = mass.sum(0, dtype=torch.int32)
        ws.slash[head, :seq_len] = 0
        ws.slash[head].scatter_add_(0, diagonal, mass.flatten())
