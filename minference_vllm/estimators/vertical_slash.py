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
    return index_masses(context_len + len(q), config, engine, ws)


def index_masses(seq_len: int, config: MInferenceConfig, engine: Engine, ws: Workspace) -> SparseIndex:
    """Index the heaviest columns and diagonals.

    Args:
        seq_len: keys of the request, the chunk's own included.
        ws: holds their masses, `vertical` and `slash`.

    Returns:
        The index, whose tensors are the workspace's: good until the next chunk.
    """
    columns = min(config.vertical_size, seq_len)
    slashes = min(config.slash_size, seq_len)
    last_tile = (seq_len - 1) // TILE
    num_bands = last_tile * BANDS_PER_TILE
    columns_below = ws.columns_below[:, : last_tile + 1]
    bands_below = ws.bands_below[:, :, : last_tile + 1]
    slash_below = ws.slash_below[:, : num_bands + BANDS_PER_TILE + 1]
    engine.select(ws.vertical, seq_len, columns, config.sink_tokens, columns_below, TILE, ws.columns, ws)
    engine.select(ws.slash, seq_len, slashes, config.local_tokens, slash_below, BAND, None, ws)
    engine.band_lists(slash_below, num_bands, ws.bands, bands_below, ws.band_halves)
    return SparseIndex(ws.bands, bands_below, ws.band_halves, ws.columns, columns_below)
