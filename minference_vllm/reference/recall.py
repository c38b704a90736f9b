# SPDX-License-Identifier: Apache-2.0
"""The share of the attention of a chunk's held-out rows that lies on the kept keys."""

import torch

from minference_vllm.chunk import Chunk
from minference_vllm.index import TILE
from minference_vllm.recall import LOST_ROWS, RECALL_EDGES, Floors, parts_of
from minference_vllm.reference.quantized import keys_and_values, queries
from minference_vllm.scratch import HELD_OUT_ROWS, RecallBuffers, RecallTotals


def held_out_rows(chunk: Chunk) -> torch.Tensor:
    """[HELD_OUT_ROWS * parts] int64, rows of the chunk: HELD_OUT_ROWS in each of its parts, see recall.parts_of."""
    parts = parts_of(chunk.num_rows)
    return torch.cat([_of_part(chunk.of_rows(part.start, len(part))) + part.start for part in parts])


def _of_part(chunk: Chunk) -> torch.Tensor:
    """[HELD_OUT_ROWS] int64, one row near the middle of each of HELD_OUT_ROWS equal ranges.

    Each row is moved, within the four rows from an absolute multiple of 4 on, to where `block` does not sample with 16
    or 32 rows per half. In tile number t, `block` samples rows that are (5 t + 3) modulo 4 or modulo 2; a held-out row
    is t modulo 4, which is never the same.
    """
    number = torch.arange(HELD_OUT_ROWS, device=chunk.q.device)
    positions = chunk.context_len + (2 * number + 1) * chunk.num_rows // (2 * HELD_OUT_ROWS)
    positions = positions // 4 * 4 + positions // TILE % 4
    return (positions - chunk.context_len).clamp(0, chunk.num_rows - 1)


def measure_recall(
    chunk: Chunk, lse: torch.Tensor, floors: Floors, layer: int, buffers: RecallBuffers, totals: RecallTotals
) -> None:
    """Measure each head's recall: the attention that its held-out rows have on kept keys, on average over the rows.

    The recall of a row is exp(lse - the row's log-sum-exp over all keys).

    Args:
        chunk: its queries and keys are read.
        lse: [num_qo_heads, >= num_rows] float32, natural log-sum-exp of each row over its kept keys, see AttendBuffers.
        floors: heads that are below a floor are listed, and heads whose recall is NaN; none if both floors are 0.
        layer: position of the layer, which is its row in `totals`.
        buffers: `recall`, `heads` and `num_heads` are written.
        totals: added to.
    """
    rows = held_out_rows(chunk)
    keys, _ = keys_and_values(chunk.kv, chunk.seq_len)
    future = torch.arange(chunk.seq_len, device=rows.device) > (chunk.context_len + rows)[:, None]
    recalls = torch.empty(chunk.num_qo_heads, len(rows), device=rows.device)
    for head in range(chunk.num_qo_heads):
        scores = queries(chunk, rows, head) @ keys[head // chunk.group_size].T * chunk.scale
        exact = scores.masked_fill_(future, -torch.inf).logsumexp(-1)
        recalls[head] = (lse[head, rows] - exact).clamp(max=0).exp()
    buffers.recall.copy_(recalls.mean(1))
    lost = (recalls < floors.row).sum(1) >= LOST_ROWS
    below = ((~(buffers.recall >= floors.head) | lost) & any(floors)).nonzero().flatten()
    buffers.heads[: len(below)] = below.to(torch.int32)
    buffers.num_heads.fill_(len(below))
    # A recall of NaN counts as 0: added to a sum, it would make that NaN for ever.
    recall = buffers.recall.nan_to_num(nan=0.0)
    buckets = (recall[:, None] > torch.tensor(RECALL_EDGES, device=rows.device)).sum(1)
    totals.histogram.index_add_(0, buckets, torch.ones_like(recall, dtype=torch.float64))
    totals.chunks[layer] += 1
    totals.redone[layer] += len(below)
    totals.sums[layer] += recall
    totals.worst[layer] = torch.minimum(totals.worst[layer], recall.double())
