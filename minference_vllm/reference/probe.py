# SPDX-License-Identifier: Apache-2.0
"""Attention of a chunk's probe rows over all keys, summed by column and by diagonal."""

import torch

from minference_vllm.chunk import Chunk
from minference_vllm.reference.quantized import keys_and_values, queries
from minference_vllm.scratch import MASS_UNIT, ProbeBuffers


def probe_rows(num_rows: int, num_last: int, num_spread: int, device: torch.device) -> torch.Tensor:
    """[num_last + num_spread] rows of the chunk that are probed; negative where the chunk is too short to have them."""
    last = torch.arange(num_rows - num_last, num_rows, device=device)
    spread = torch.arange(1, num_spread + 1, device=device) * num_rows // max(num_spread, 1) - 1
    return torch.cat([last, spread])


def probe(chunk: Chunk, num_last: int, num_spread: int, buffers: ProbeBuffers) -> None:
    """Estimate how much attention columns and diagonals get (MInference, arXiv 2407.02490, algorithm 2).

    Args:
        chunk: its queries and keys are read.
        num_last, num_spread: how many probe rows are the chunk's last ones and how many lie evenly over it.
        buffers: `vertical`, `slash` and `lse` are written.

    Masses are integers, multiples of MASS_UNIT, so that their sums are exact and the same in any order of adding.
    """
    q, seq_len = chunk.q, chunk.seq_len
    keys, _ = keys_and_values(chunk.kv, seq_len)
    rows = probe_rows(chunk.num_rows, num_last, num_spread, q.device)
    positions = chunk.context_len + rows
    # [probe_rows, seq_len]
    distance = positions[:, None] - torch.arange(seq_len, device=q.device)
    visible = (distance >= 0) & (rows >= 0)[:, None]
    diagonal = distance.clamp(min=0).flatten()
    for head in range(chunk.num_qo_heads):
        scores = queries(chunk, rows.clamp(min=0), head) @ keys[head // chunk.group_size].T * chunk.scale
        scores = scores.masked_fill(~visible, -torch.inf)
        lse = scores.logsumexp(-1)
        mass = (scores - lse[:, None]).exp().where(visible, 0.0)
        mass = (mass / MASS_UNIT).round().to(torch.int32)
        buffers.lse[head, : len(rows)] = lse
        buffers.vertical[head, :seq_len] = mass.sum(0, dtype=torch.int32)
        buffers.slash[head, :seq_len] = 0
        buffers.slash[head].scatter_add_(0, diagonal, mass.flatten())
