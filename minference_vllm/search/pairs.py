# SPDX-License-Identifier: Apache-2.0
"""The work that an index causes, head by head; computed on the device, without waiting for it."""

import torch

from minference_vllm.chunk import Chunk
from minference_vllm.index import BAND, EVERY_GROUP, GROUP, GROUPS_PER_TILE, HALF, TILE, SparseIndex, TileIndex
from minference_vllm.scratch import RecallBuffers


def every_key(chunk: Chunk) -> TileIndex:
    """An index that keeps everything."""
    size = chunk.num_qo_heads, chunk.num_tiles
    counts = torch.zeros(*size, 3, dtype=torch.int32, device=chunk.q.device)
    counts[:, :, 0] = EVERY_GROUP
    return TileIndex(torch.zeros(*size, 1, dtype=torch.int32, device=chunk.q.device), counts)


def worked_pairs(index: SparseIndex, chunk: Chunk) -> torch.Tensor:
    """[num_qo_heads] float64: row-key pairs that the kernel works on, which are those of whole tiles.

    Keys that are in two parts of an index are loaded twice, and count twice.
    """
    first, count = chunk.first_tile, chunk.num_tiles
    if isinstance(index, TileIndex):
        both, *halves = index.counts.double().unbind(2)
        before = GROUPS_PER_TILE * torch.arange(first, first + count, device=both.device, dtype=both.dtype)
        both = torch.where(both == EVERY_GROUP, before, both)
        keys = GROUP * (both * TILE + sum(halves) * HALF)
    else:
        tiles = slice(first, first + count)
        both, *halves = index.bands_indptr[:, :, tiles].double().unbind(1)
        keys = BAND * (both * TILE + sum(halves) * HALF) + TILE * index.columns_indptr[:, tiles].double()
    own = TILE * (TILE + 1) // 2
    return (keys + own).sum(1)


def redone_pairs(rows: Chunk, buffers: RecallBuffers) -> torch.Tensor:
    """[num_qo_heads] float64: the pairs that heads work on when the guard has them attend to all keys.

    Args:
        rows: the rows of the chunk that chose keys.
        buffers: what the guard measured of them.
    """
    heads = buffers.heads.long()
    is_redone = (torch.arange(len(heads), device=heads.device) < buffers.num_heads).double()
    # Entries after the first num_heads are of earlier chunks, and add nothing.
    redone = torch.zeros_like(is_redone).index_add_(0, heads, is_redone)
    return redone * worked_pairs(every_key(rows), rows)
