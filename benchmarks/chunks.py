# SPDX-License-Identifier: Apache-2.0
"""Our attention of a chunk, its scratch and its check, and what all chunks of a prompt take, as vLLM serves it."""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks import peers
from benchmarks.cases import Case, Inputs, configure
from benchmarks.timing import median
from minference_vllm import reference
from minference_vllm.config import MInferenceConfig
from minference_vllm.engine import Engine, load_engine
from minference_vllm.estimators.vertical_slash import vertical_slash
from minference_vllm.index import TILE, PagedKV, SparseIndex
from minference_vllm.tuning.masses import KeySets
from minference_vllm.workspace import Geometry, Workspace

TOLERANCE = 1e-2
MOST_TIMED = 16  # chunks of a prompt; a million tokens have 64


def workspace(case: Case, config: MInferenceConfig, chunk: int, device: torch.device) -> Workspace:
    probes = sum(config.probe_counts)
    return Workspace.allocate(Geometry(case.num_qo_heads, case.tokens, chunk, probes, case.vertical), device)


def with_other_masses(ws: Workspace) -> Workspace:
    """The same scratch with masses of its own: a probe that fills them leaves the drawn ones in `ws` alone."""
    return replace(ws, vertical=torch.empty_like(ws.vertical), slash=torch.empty_like(ws.slash))


def our_error(inputs: Inputs, index: SparseIndex, out: torch.Tensor, context_len: int) -> float:
    """Largest relative error over a few tiles and heads, against the reference on the same index.

    Args:
        inputs: the whole prompt.
        index: what the chunk keeps.
        out: [num_rows, num_qo_heads, head_dim], the chunk's output.
        context_len: keys before the chunk.
    """
    q, (k, v, *pages), scale = inputs
    errors = []
    for head in peers.sampled_heads(q):
        of_head = SparseIndex(*(getattr(index, part.name)[head : head + 1] for part in fields(index)))
        of_group = head // (q.shape[1] // k.shape[1])
        kv = PagedKV(k[:, of_group : of_group + 1], v[:, of_group : of_group + 1], *pages)
        for first in peers.sampled_rows(len(out), TILE):
            before = context_len + first
            rows = q[before : before + TILE, head : head + 1]
            expected, lse = torch.empty_like(rows, dtype=torch.float32), rows.new_empty(1, TILE, dtype=torch.float32)
            pairs = torch.zeros(1, dtype=torch.int64, device=q.device)
            reference.attend(rows, kv, before, scale, of_head, expected, lse, pairs)
            errors.append(peers.difference(out[first : first + TILE, head : head + 1], expected))
    return peers.worst(errors)


def check(
    case: Case, inputs: Inputs, engine: Engine, index: SparseIndex, out: torch.Tensor, context_len: int = 0
) -> float:
    """Relative error of a chunk's output: see our_error.

    Raises:
        SystemExit: the output is wrong.
    """
    error = our_error(inputs, index, out, context_len)
    if not (error <= TOLERANCE and out.sum().isfinite()):
        rows = f"of rows {context_len} to {context_len + len(out) - 1}"
        raise SystemExit(f"{case}: our output {rows} ({engine.name}) is wrong, relative error {error:.1e}")
    return error


def time_chunks(case: Case, inputs: Inputs, kernel: str, seed: int) -> dict[str, Any]:
    """Field of a row: what all chunks of the prompt take, each choosing from drawn masses and attending.

    Raises:
        SystemExit: the output of the chunk in the middle is wrong.
    """
    device = inputs.q.device
    config = configure(case, kernel)
    engine = load_engine(config, device)
    ws = workspace(case, config, case.chunk, device)
    probed = with_other_masses(ws)
    choosing = replace(engine, probe=lambda *arguments: engine.probe(*arguments[:-1], probed))
    out = torch.empty(case.chunk, *inputs.q.shape[1:], dtype=inputs.q.dtype, device=device)

    def run(context_len: int) -> tuple[SparseIndex, torch.Tensor]:
        q, kv, scale = inputs.q[context_len : context_len + case.chunk], inputs.kv, inputs.scale
        written = out[: len(q)]
        index = vertical_slash(q, kv, context_len, scale, config, choosing, ws)
        engine.attend(q, kv, context_len, scale, index, written, ws.lse, ws.kept_pairs)
        return index, written

    num_chunks = -(-case.tokens // case.chunk)
    timed = timed_chunks(num_chunks)
    times = []
    for number in timed:
        context_len = number * case.chunk
        # One for each chunk: it holds on to what it has drawn, for all chunks gigabytes.
        KeySets(seed).overwrite(ws, min(context_len + case.chunk, case.tokens), config)
        if number == timed[len(timed) // 2]:
            out.fill_(torch.nan)  # what the chunk before has left here would do for rows that are not written
            check(case, inputs, engine, *run(context_len), context_len)
        times.append(median(partial(run, context_len), device))
    return {"chunks_ms": total_ms(num_chunks, timed, times)}


def timed_chunks(num_chunks: int) -> list[int]:
    """Ascending numbers of the chunks to time, all if they are few: the first two, every k-th from there, the last.

    The first has no context and costs less than a line through its neighbours says, so nothing is left out after it.
    """
    step = max(-(-(num_chunks - 2) // (MOST_TIMED - 2)), 1)
    return sorted({0, *range(1, num_chunks, step), num_chunks - 1})


def total_ms(num_chunks: int, timed: Sequence[int], times: Sequence[float]) -> float:
    """Sum over all chunks; what lies between two timed ones lies on a line (trapezoid rule)."""
    return float(np.interp(range(num_chunks), timed, times).sum())
