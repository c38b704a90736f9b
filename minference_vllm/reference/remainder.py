# SPDX-License-Identifier: Apache-2.0
"""The remainder of attention, on the keys that a tile drops: boxes are summarised, and rows attend to summaries."""

import torch

from minference_vllm.chunk import Chunk, PagedKV
from minference_vllm.index import EVERY_GROUP, GROUP, HALF, HALVES, TILE, TileIndex
from minference_vllm.reference.quantized import keys_and_values, queries
from minference_vllm.remainder import LARGEST, SPREAD, Summaries
from minference_vllm.scratch import AttendBuffers


def summarise(kv: PagedKV, num_boxes: int, keys_per_box: int, summaries: Summaries) -> None:
    """Summarise the first boxes of a request.

    Args:
        kv: its keys and values are read, with their scales.
        num_boxes: how many boxes; all of their keys must be in the cache.
        keys_per_box: a multiple of GROUP.
        summaries: the first `num_boxes` of each KV head are written.
    """
    if not num_boxes:
        return
    keys, values = (x.unflatten(1, (num_boxes, keys_per_box)) for x in keys_and_values(kv, num_boxes * keys_per_box))
    made = keys.mean(2), keys.var(2, correction=0), values.mean(2)
    for summary, of_boxes in zip((summaries.keys, summaries.spreads, summaries.values), made, strict=True):
        summary[: kv.num_kv_heads, :num_boxes] = of_boxes.clamp(-LARGEST, LARGEST)


def add_remainder(
    chunk: Chunk, index: TileIndex, keys_per_box: int, summaries: Summaries, buffers: AttendBuffers
) -> None:
    """Add to the output of each row what the keys that its tile drops are estimated to give.

    A box that lies before the tile as a whole takes part with as many keys as are dropped in it. Each is taken to have
    the score scale · q · mean + SPREAD / 2 · scale² · q² · variance, and the mean of the box's values. Tiles that keep
    all groups are left as they are.

    Args:
        chunk: its queries are read; `out` has attention over the kept keys, and gets the remainder added.
        index: what is kept.
        keys_per_box, summaries: see summarise; the summaries of all boxes before the chunk's last tile are read.
        buffers: `lse` of the kept keys becomes that of kept keys and remainder.
    """
    for i in range(chunk.context_len // HALF, (chunk.seq_len - 1) // HALF + 1):
        tile, half = divmod(i, HALVES)
        num_boxes = tile * TILE // keys_per_box
        first, last = max(i * HALF, chunk.context_len), min(i * HALF + HALF, chunk.seq_len)
        rows = slice(first - chunk.context_len, last - chunk.context_len)
        for head in range(chunk.num_qo_heads if num_boxes else 0):
            dropped = dropped_keys(index, head, tile - chunk.first_tile, half, num_boxes, keys_per_box)
            if dropped is not None:
                _add(chunk, head, rows, dropped, summaries, buffers)


def dropped_keys(
    index: TileIndex, head: int, tile: int, half: int, num_boxes: int, keys_per_box: int
) -> torch.Tensor | None:
    """[num_boxes] int64, the keys of each box that a half of a tile of the chunk drops; None if it keeps all groups."""
    both, first, second = index.counts[head, tile].tolist()
    if both == EVERY_GROUP:
        return None
    kinds = index.groups[head, tile, : both + first + second].long().split([both, first, second])
    boxes = torch.cat([kinds[0], kinds[1 + half]]) * GROUP // keys_per_box
    kept = torch.bincount(boxes, minlength=num_boxes)[:num_boxes]
    return keys_per_box - kept * GROUP


def _add(
    chunk: Chunk, head: int, rows: slice, dropped: torch.Tensor, summaries: Summaries, buffers: AttendBuffers
) -> None:
    kv_head, num_boxes = head // chunk.group_size, len(dropped)
    keys, spreads, values = (
        x[kv_head, :num_boxes].float() for x in (summaries.keys, summaries.spreads, summaries.values)
    )
    q = queries(chunk, rows, head) * chunk.scale
    # [rows, boxes]
    scores = q @ keys.T + SPREAD / 2 * q.square() @ spreads.T + dropped.log()
    of_kept = buffers.lse[head, rows]
    # A sink takes its share of a row before and after.
    sink = torch.tensor(-torch.inf, device=q.device) if chunk.sinks is None else chunk.sinks[head].float()
    total = torch.logaddexp(of_kept, scores.logsumexp(-1))
    with_sink = torch.logaddexp(total, sink)
    out = chunk.out[rows, head].float() * (torch.logaddexp(of_kept, sink) - with_sink).exp()[:, None]
    chunk.out[rows, head] = (out + (scores - with_sink[:, None]).exp() @ values).to(chunk.out.dtype)
    buffers.lse[head, rows] = total
