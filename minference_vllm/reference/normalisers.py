# SPDX-License-Identifier: Apache-2.0
"""By what the scores of the rows that choose groups are normalised, and which rows those are."""

import math

import torch

from minference_vllm.chunk import Chunk
from minference_vllm.index import GROUP, HALF, HALVES, TILE
from minference_vllm.reference.operands import from_operand, query_rows
from minference_vllm.reference.quantized import score_scales
from minference_vllm.scratch import MEAN

PART = 16
"""A half's sampled rows come in parts of this many that follow each other; each part's masses have codes of their own.

Kernels that make masses work on "lists": a list is a part under one head.
"""

NORMALISER_KEYS = 64
"""First keys of a request that every row's normaliser counts, whatever the settings keep: there lie attention sinks."""

LIMIT = 0.25
"""The most that a mean counts in a row's choice, of what the row's normaliser has seen. Masses are in units of this."""


def sampled_rows(chunk: Chunk, rows_per_half: int) -> torch.Tensor:
    """[num_tiles * HALVES, rows_per_half] int64, absolute rows that choose for each half of each tile of the chunk.

    They lie evenly over the half, at an offset that changes from tile to tile, lest they meet the same words of a text
    of that period everywhere; it is always the same for the same tile. In place of rows before the chunk or past it
    stand its first or its last. A half of which the chunk has no row has -1.
    """
    stride = HALF // rows_per_half
    halves = torch.arange(chunk.num_tiles * HALVES, device=chunk.q.device)[:, None] + chunk.first_tile * HALVES
    offset = (halves // HALVES * 5 + 3) % stride
    rows = halves * HALF + offset + stride * torch.arange(rows_per_half, device=chunk.q.device)
    absent = (halves * HALF >= chunk.seq_len) | (halves * HALF + HALF <= chunk.context_len)
    return rows.clamp(chunk.context_len, chunk.seq_len - 1).masked_fill(absent, -1)


def row_normalisers(chunk: Chunk, means: torch.Tensor, row_lse: torch.Tensor, mean: int = MEAN) -> None:
    """Log-sum-exp of each sampled row over means of its own tile and of the first keys of the request, times LIMIT.

    A row's own tile up to the row's group, and the first NORMALISER_KEYS keys: most rows have most of their attention
    there, and rows that have not are held back where masses are made. Means and no single keys, even where those are
    read anyway: peaks of single keys would make rows that have them count for little. See docs/methods.md.

    Args:
        chunk: its queries are read.
        means: [num_kv_heads, >= seq_len // mean, head_dim], of all keys of the request: see key_means. Where they are
            FP8, rows are rounded to it too.
        row_lse: [num_qo_heads, >= num_tiles * HALVES, rows_per_half] float32, written: natural logarithms, a mean
            counted as often as it has keys, plus log(LIMIT). Infinity for rows of a half of which the chunk has none,
            so that they weigh nothing; minus infinity if the request has no mean yet. rows_per_half is 16, 32 or 64.
        mean: keys in a mean.
    """
    scales = score_scales(chunk)
    for half, rows in enumerate(sampled_rows(chunk, row_lse.shape[2])):
        if rows[0] < 0:
            row_lse[:, half] = torch.inf
            continue
        tile_start = (chunk.first_tile + half // HALVES) * TILE
        # The first tile has the first keys itself.
        first = torch.arange(min(NORMALISER_KEYS, tile_start) // mean, device=rows.device)
        own = torch.arange(tile_start // mean, chunk.seq_len // mean, device=rows.device)
        number = torch.cat([first, own])
        # [rows_per_half, means]
        hidden = number * mean // GROUP > rows[:, None] // GROUP
        for head in range(chunk.num_qo_heads):
            q = query_rows(chunk.q[rows - chunk.context_len, head], means) * scales[head]
            scores = q @ from_operand(means[head // chunk.group_size, number]).T + math.log(mean * LIMIT)
            row_lse[head, half] = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
