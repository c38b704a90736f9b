# SPDX-License-Identifier: Apache-2.0
"""Vertical-slash (arXiv 2407.02490, section 3.2): the key columns and diagonals that probe rows weigh most."""

import torch

from minference_vllm.config import MInferenceConfig
from minference_vllm.engine import Engine
from minference_vllm.index import BAND, BANDS_PER_TILE, TILE, PagedKV, SparseIndex
from minference_vllm.workspace import Workspace


def vertical_slash(
    q: torch.Tensor,
    kv: PagedKV,
    context_len: int,
    scale: float,
    config: MInferenceConfig,
    engine: Engine,
    ws: Workspace,
) -> SparseIndex:
    """Estimate the pattern of one chunk and index it.

    Args:
        q: [num_rows, num_qo_heads, head_dim], the chunk's queries.
        kv: the request's cache, the chunk's own keys already in it.
        context_len: keys before the chunk.
        scale: softmax scale.

    Returns:
        The index, whose tensors are the workspace's: good until the next chunk.
    """
    num_last, num_spread = config.probe_counts
    engine.probe(q, kv, context_len, scale, num_last, num_spread, ws)
    seq_len = context_len + len(q)
    columns = min(config.vertical_size, seq_len)
    slashes = min(config.slash_size, seq_len)
    last_tile = (seq_len - 1) // TILE
    num_bands = last_tile * BANDS_PER_TILE
    columns_below = ws.columns_below[:, : last_tile + 1]
    slash_below = ws.slash_below[:, : num_bands + BANDS_PER_TILE + 1]
    engine.select(ws.vertical, seq_len, columns, config.sink_tokens, columns_below, TILE, ws.columns, ws)
    engine.select(ws.slash, seq_len, slashes, config.local_tokens, slash_below, BAND, None, ws)
    engine.band_lists(slash_below, num_bands, ws.bands, ws.bands_below)
    return SparseIndex(ws.bands, ws.bands_below, ws.columns, columns_below)
