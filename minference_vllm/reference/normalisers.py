# SPDX-License-Identifier: Apache-2.0
"""The rows that choose groups, and the normalisers of their scores."""

import math

import torch

from minference_vllm.chunk import Chunk
from minference_vllm.index import GROUP, HALF, HALVES, TILE
from minference_vllm.reference.operands import from_operand, query_rows
from minference_vllm.reference.quantized import score_scales
from minference_vllm.scratch import MEAN

PART = 16
"""Rows in a part: a half's sampled rows are divided into parts of consecutive rows, and masses are summed by part.

The kernels that compute masses work on "lists": a list is a part for one query head.
"""

NORMALISER_KEYS = 64
"""How many first keys every row's normaliser includes, whatever the settings keep: attention sinks lie there."""

LIMIT = 0.25
"""The most that a mean can count for a row, as a share of what the row's normaliser includes. It is the unit of
masses."""


def sampled_rows(chunk: Chunk, rows_per_half: int) -> torch.Tensor:
    """[num_tiles * HALVES, rows_per_half] int64, absolute rows that choose for each half of each tile of the chunk.

    They are evenly spaced over the half, at an offset that depends on the tile's number only. It differs from tile to
    tile because in a text that repeats with the same period, a constant offset would always sample the same words. Rows
    before or past the chunk are replaced by its first or last row. A half of which the chunk has no row has -1.
    """
    stride = HALF // rows_per_half
    halves = torch.arange(chunk.num_tiles * HALVES, device=chunk.q.device)[:, None] + chunk.first_tile * HALVES
    offset = (halves // HALVES * 5 + 3) % stride
    rows = halves * HALF + offset + stride * torch.arange(rows_per_half, device=chunk.q.device)
    absent = (halves * HALF >= chunk.seq_len) | (halves * HALF + HALF <= chunk.context_len)
    return rows.clamp(chunk.context_len, chunk.seq_len - 1).masked_fill(absent, -1)


def row_normalisers(chunk: Chunk, means: torch.Tensor, row_lse: torch.Tensor, mean: int = MEAN) -> None:
    """Log-sum-exp of each sampled row over means of its own tile and of the request's first keys, plus log(LIMIT).

    It includes the means of the row's own tile up to the row's group, and of the first NORMALISER_KEYS keys. Most rows
    have most of their attention there; for the others, group_masses limits what a mean can count. It uses means even
    where single keys are read anyway: a peak at a single key would make all other masses of its row too small, so that
    the row would count for little. See docs/methods.md.

    Args:
        chunk: its queries are read.
        means: [num_kv_heads, >= seq_len // mean, head_dim], of all keys of the request: see key_means. Where they are
            FP8, rows are rounded to it too.
        row_lse: [num_qo_heads, >= num_tiles * HALVES, rows_per_half] float32, written: natural logarithms, each mean
            weighted by its number of keys, plus log(LIMIT). Infinity for a half of which the chunk has no row, so that
            its masses are 0; minus infinity if the request has no mean yet. rows_per_half is 16, 32 or 64.
        mean: keys in a mean.
    """
    scales = score_scales(chunk)
    for half, rows in enumerate(sampled_rows(chunk, row_lse.shape[2])):
        if rows[0] < 0:
            row_lse[:, half] = torch.inf
            continue
        tile_start = (chunk.first_tile + half // HALVES) * TILE
        # In the first tile the first keys are its own: they must not be counted twice.
        first = torch.arange(min(NORMALISER_KEYS, tile_start) // mean, device=rows.device)
        own = torch.arange(tile_start // mean, chunk.seq_len // mean, device=rows.device)
        number = torch.cat([first, own])
        # [rows_per_half, means]
        hidden = number * mean // GROUP > rows[:, None] // GROUP
        for head in range(chunk.num_qo_heads):
            q = query_rows(chunk.q[rows - chunk.context_len, head], means) * scales[head]
            scores = q @ from_operand(means[head // chunk.group_size, number]).T + math.log(mean * LIMIT)
            row_lse[head, half] = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
