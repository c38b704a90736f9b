# SPDX-License-Identifier: Apache-2.0
"""Attention of a chunk over the keys that a SparseIndex keeps, half a tile at a time, in float32 on gathered keys."""

import torch

from minference_vllm.index import BAND, BANDS_PER_TILE, HALF, HALVES, TILE, PagedKV, SparseIndex
from minference_vllm.reference.pages import gather


def attend(
    q: torch.Tensor,
    kv: PagedKV,
    context_len: int,
    scale: float,
    index: SparseIndex,
    out: torch.Tensor,
    lse: torch.Tensor,
    kept_pairs: torch.Tensor,
) -> None:
    """Attend to the kept keys of each row.

    Args:
        q: [num_rows, num_qo_heads, head_dim], the chunk's queries.
        kv: the request's cache, the chunk's own keys already in it.
        context_len: keys before the chunk.
        scale: softmax scale.
        index: what is kept.
        out: [num_rows, num_qo_heads, head_dim], written.
        lse: [num_qo_heads, >= num_rows] float32, written: natural log-sum-exp of each row over its kept keys.
        kept_pairs: [1] int64, added to: how many row-key pairs were attended to.
    """
    num_rows, num_qo_heads, _ = q.shape
    seq_len = context_len + num_rows
    keys, values = (cache.float() for cache in gather(kv, seq_len))
    group = num_qo_heads // len(keys)
    for i in range(context_len // HALF, (seq_len - 1) // HALF + 1):
        tile, half = divmod(i, HALVES)
        first, last = max(i * HALF, context_len), min(i * HALF + HALF, seq_len)
        rows = slice(first - context_len, last - context_len)
        # The tile's own keys, those past the half's last row left out: no row of the half sees them.
        own = torch.arange(tile * TILE, last, device=q.device)
        # [rows of the half, own keys]
        future = own > torch.arange(first, last, device=q.device)[:, None]
        num_future = future.sum()
        for head in range(num_qo_heads):
            earlier = kept_before(index, head, tile, half)
            kept = torch.cat([earlier, own])
            scores = (q[rows, head].float() * scale) @ keys[head // group, kept].T
            scores[:, len(earlier) :].masked_fill_(future, -torch.inf)
            lse[head, rows] = scores.logsumexp(-1)
            probabilities = scores.sub_(lse[head, rows, None]).exp_()
            out[rows, head] = (probabilities @ values[head // group, kept]).to(out.dtype)
            kept_pairs += scores.numel() - num_future


def kept_before(index: SparseIndex, head: int, tile: int, half: int) -> torch.Tensor:
    """[num_kept] int64, ascending: the keys before a tile that all rows of one of its halves attend to."""
    kept = torch.zeros(tile * TILE, dtype=torch.bool, device=index.bands.device)
    for kind in (0, 1 + half):
        offsets = index.bands[head, kind, : index.bands_below[head, kind, tile]].long()
        kept.view(-1, BAND)[tile * BANDS_PER_TILE - offsets] = True
    kept[index.columns[head, : index.columns_below[head, tile]].long()] = True
    return kept.nonzero().flatten()
