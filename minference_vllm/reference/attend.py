# SPDX-License-Identifier: Apache-2.0
"""Attention of a chunk over the keys that an index keeps, half a tile at a time, in float32 on gathered keys."""

import torch

from minference_vllm.chunk import Chunk
from minference_vllm.index import (
    BAND,
    BANDS_PER_TILE,
    EVERY_GROUP,
    GROUP,
    HALF,
    HALVES,
    TILE,
    AnyIndex,
    BandIndex,
    HeadIndex,
    TileIndex,
)
from minference_vllm.reference.quantized import keys_and_values, queries
from minference_vllm.scratch import AttendBuffers


def attend(chunk: Chunk, index: AnyIndex, buffers: AttendBuffers) -> None:
    """Attend to the kept keys of each row.

    Args:
        chunk: its queries and cache are read, its `out` is written; with a HeadIndex only for the listed heads.
        index: what is kept.
        buffers: `lse` is written for the same heads as `out`; `kept_pairs` is added to.
    """
    q, context_len, seq_len = chunk.q, chunk.context_len, chunk.seq_len
    keys, values = keys_and_values(chunk.kv, seq_len)
    heads = index.heads[: int(index.num_heads)].tolist() if isinstance(index, HeadIndex) else range(chunk.num_qo_heads)
    for i in range(context_len // HALF, (seq_len - 1) // HALF + 1):
        tile, half = divmod(i, HALVES)
        first, last = max(i * HALF, context_len), min(i * HALF + HALF, seq_len)
        rows = slice(first - context_len, last - context_len)
        # The tile's own keys, those past the half's last row left out: no row of the half sees them.
        own = torch.arange(tile * TILE, last, device=q.device)
        # [rows of the half, own keys]
        future = own > torch.arange(first, last, device=q.device)[:, None]
        num_future = future.sum()
        for head in heads:
            if isinstance(index, BandIndex):
                earlier = kept_before(index, head, tile, half)
            elif isinstance(index, TileIndex):
                earlier = kept_by_tile(index, head, tile, half, chunk.first_tile)
            else:
                earlier = torch.arange(tile * TILE, device=q.device)
            kept = torch.cat([earlier, own])
            scores = (queries(chunk, rows, head) * chunk.scale) @ keys[head // chunk.group_size, kept].T
            scores[:, len(earlier) :].masked_fill_(future, -torch.inf)
            buffers.lse[head, rows] = scores.logsumexp(-1)
            probabilities = scores.sub_(buffers.lse[head, rows, None]).exp_()
            if chunk.sinks is not None:
                # exp(lse) / (exp(lse) + exp(sink)): a sink has no value, it only takes its share from the keys.
                probabilities *= (buffers.lse[head, rows, None] - chunk.sinks[head]).sigmoid()
            chunk.out[rows, head] = (probabilities @ values[head // chunk.group_size, kept]).to(chunk.out.dtype)
            buffers.kept_pairs.add_(scores.numel() - num_future)


def kept_before(index: BandIndex, head: int, tile: int, half: int) -> torch.Tensor:
    """[num_kept] int64, ascending: the keys before a tile that all rows of one of its halves attend to."""
    kept = torch.zeros(tile * TILE, dtype=torch.bool, device=index.bands.device)
    for kind in (0, 1 + half):
        offsets = index.bands[head, kind, : index.bands_indptr[head, kind, tile]].long()
        kept.view(-1, BAND)[tile * BANDS_PER_TILE - offsets] = True
    kept[index.columns[head, : index.columns_indptr[head, tile]].long()] = True
    return kept.nonzero().flatten()


def kept_by_tile(index: TileIndex, head: int, tile: int, half: int, first_tile: int) -> torch.Tensor:
    """The same as `kept_before`, from an index whose lists begin with the chunk's first tile."""
    both, first, second = index.counts[head, tile - first_tile].tolist()
    if both == EVERY_GROUP:
        return torch.arange(tile * TILE, device=index.groups.device)
    kinds = index.groups[head, tile - first_tile, : both + first + second].long().split([both, first, second])
    groups = torch.cat([kinds[0], kinds[1 + half]]).sort().values
    return (groups[:, None] * GROUP + torch.arange(GROUP, device=groups.device)).flatten()
