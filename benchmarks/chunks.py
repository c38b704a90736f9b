# SPDX-License-Identifier: Apache-2.0
"""Our attention of a chunk with its check, and the time of all chunks of a prompt, as vLLM serves it."""

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import peers
from benchmarks.cases import Case, Inputs, configure
from benchmarks.timing import median
from minference_vllm import reference
from minference_vllm.attention import prefill
from minference_vllm.chunk import Chunk, PagedKV
from minference_vllm.index import TILE, BandIndex
from minference_vllm.methods import make_method
from minference_vllm.ops import choose_kernel
from minference_vllm.scratch import AttendBuffers
from minference_vllm.tuning.drawn import drawn_choice
from minference_vllm.tuning.timing import make_state

TOLERANCE = 1e-2
MOST_TIMED = 16  # chunks of a prompt; a million tokens have 64


def our_error(chunk: Chunk, index: BandIndex) -> float:
    """Largest relative error of a chunk's output over a few tiles and heads, against the reference on the same index.

    Args:
        chunk: a chunk whose output has been computed.
        index: what was kept for it.
    """
    k, v, *pages = chunk.kv
    lse = AttendBuffers.allocate(1, TILE, chunk.q.device)
    errors = []
    for head in peers.sampled_heads(chunk.q):
        of_head = BandIndex(*(getattr(index, part.name)[head : head + 1] for part in fields(index)))
        of_group = slice(head // chunk.group_size, head // chunk.group_size + 1)
        kv = PagedKV(k[:, of_group], v[:, of_group], *pages)
        for first in peers.sampled_rows(chunk.num_rows, TILE):
            rows = chunk.q[first : first + TILE, head : head + 1].float()
            expected = torch.empty_like(rows)
            reference.attend(Chunk(rows, expected, kv, chunk.context_len + first, chunk.scale), of_head, lse)
            errors.append(peers.difference(chunk.out[first : first + TILE, head : head + 1], expected))
    return peers.worst(errors)


def check(case: Case, chunk: Chunk, index: BandIndex, kernel: str) -> float:
    """Relative error of a chunk's output: see our_error.

    Raises:
        SystemExit: the output is wrong.
    """
    error = our_error(chunk, index)
    if not (error <= TOLERANCE and chunk.out.sum().isfinite()):
        rows = f"of rows {chunk.context_len} to {chunk.seq_len - 1}"
        raise SystemExit(f"{case}: our output {rows} ({kernel}) is wrong, relative error {error:.1e}")
    return error


def time_chunks(case: Case, inputs: Inputs, kernel: str, seed: int) -> dict[str, Any]:
    """Fields of a row: the time of all chunks of the prompt, each of which chooses from drawn masses and attends.

    Raises:
        SystemExit: the output of the chunk in the middle is wrong.
    """
    device = inputs.q.device
    config = configure(case, kernel)
    method = make_method(config.method, choose_kernel(config.kernel, device))
    state = make_state(method, case.scratch(case.chunk), device)
    out = torch.empty(case.chunk, *inputs.q.shape[1:], dtype=inputs.q.dtype, device=device)
    num_chunks = -(-case.tokens // case.chunk)
    timed = timed_chunks(num_chunks)
    times = []
    for number in timed:
        context_len = number * case.chunk
        chunk = inputs.chunk(context_len, out[: case.tokens - context_len])
        run = partial(prefill, chunk, method, state, drawn_choice(method, chunk, state, seed))
        if number == timed[len(timed) // 2]:
            out.fill_(torch.nan)  # otherwise rows that are not written could pass with the output of the chunk before
            check(case, chunk, run(), method.kernel)
        times.append(median(run, device))
    return {"chunks_ms": total_ms(num_chunks, timed, times)}


def timed_chunks(num_chunks: int) -> list[int]:
    """Ascending numbers of the chunks to time: all if they are few, else the first two, then every k-th, and the last.

    The first chunk has no context and costs less than its neighbours suggest, so the second one is timed as well.
    """
    step = max(-(-(num_chunks - 2) // (MOST_TIMED - 2)), 1)
    return sorted({0, *range(1, num_chunks, step), num_chunks - 1})


def total_ms(num_chunks: int, timed: Sequence[int], times: Sequence[float]) -> float:
    """The sum over all chunks. The times of chunks that were left out are interpolated linearly (trapezoid rule)."""
    return float(np.interp(range(num_chunks), timed, times).sum())
