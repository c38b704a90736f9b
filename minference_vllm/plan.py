# SPDX-License-Identifier: Apache-2.0
"""Which rows of a step go sparse: decided once a step, from host data alone."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from minference_vllm.config import MInferenceConfig

Path = Literal["sparse", "dense"]


class Reason(StrEnum):
    """Why prefill ran where it ran; the label of metrics and logs."""

    GATE_OPEN = "gate_open"
    """Sparse: the chunk passed the gate."""

    BELOW_MIN_SEQ_LEN = "below_min_seq_len"
    SHORT_CHUNK = "short_chunk"
    NO_HOST_METADATA = "no_host_metadata"
    """The step carries no prefill flags or lengths on the host."""

    NOT_CAUSAL = "not_causal"
    MM_PREFIX = "mm_prefix"
    RSWA = "rswa"
    FAST_PREFILL = "kv_sharing_fast_prefill"

    NOT_DECODER = "not_decoder"
    SLIDING_WINDOW = "sliding_window"
    CHUNKED_LOCAL = "chunked_local"
    ALIBI = "alibi"
    SOFT_CAP = "logits_soft_cap"
    ATTENTION_SINKS = "attention_sinks"
    QUANTIZED_KV = "quantized_kv_cache"
    DTYPE = "dtype"
    HEAD_DIM = "head_dim"
    CONTEXT_PARALLEL = "context_parallel"
    MICRO_BATCHING = "micro_batching"
    KV_SHARING = "kv_sharing"
    DRAFT_LAYER = "draft_layer"
    DENSE_LAYER = "dense_layer"
    BATCH_INVARIANT = "batch_invariant"


class SparseChunk(NamedTuple):
    """One request's rows of this step, to run sparse.

    Attributes:
        request: row of the request in the step's block table.
        query_start: its first row in the step's query tensor.
        num_rows: query rows.
        context_len: keys before the chunk.
    """

    request: int
    query_start: int
    num_rows: int
    context_len: int

    @property
    def seq_len(self) -> int:
        return self.context_len + self.num_rows

    @property
    def causal_pairs(self) -> int:
        """Row-key pairs that dense causal attention would compute."""
        return self.num_rows * self.context_len + self.num_rows * (self.num_rows + 1) // 2


class DenseRun(NamedTuple):
    """A maximal run of neighbouring dense requests: requests [first, end), query rows [query_start, query_end)."""

    first: int
    end: int
    query_start: int
    query_end: int
    max_query_len: int
    max_seq_len: int


class Plan(NamedTuple):
    """What a step does. `chunks` is empty when the whole step runs dense, as if the plugin were not there.

    Attributes:
        chunks: what runs sparse.
        dense_runs: the other rows, if anything runs sparse.
        tokens: prefill tokens of this step by path and reason; decode rows are not prefill.
        chunk_counts: prefill chunks (requests' shares of this step), likewise.
    """

    chunks: tuple[SparseChunk, ...]
    dense_runs: tuple[DenseRun, ...]
    tokens: dict[tuple[Path, Reason], int]
    chunk_counts: dict[tuple[Path, Reason], int]

    @classmethod
    def all_dense(cls, reason: Reason, tokens: int) -> "Plan":
        """The plan of a step whose rows cannot be told apart."""
        return cls((), (), {("dense", reason): tokens}, {("dense", reason): 1}) if tokens else NOTHING


FEW = 16
"""Prefill requests that are looked at one by one faster than all at once."""

NOTHING = Plan((), (), {}, {})
"""The plan of a step without prefill."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step in which something runs sparse; the attribute `minference` of vLLM's metadata, else None.

    Attributes:
        chunks: requests' rows that run sparse.
        dense_runs: the other rows, in runs of neighbouring requests, each with the metadata of a batch of its own.
    """

    chunks: tuple[SparseChunk, ...]
    dense_runs: tuple[tuple[DenseRun, Any], ...]


def make_plan(
    query_start_loc: np.ndarray,
    seq_lens: np.ndarray,
    is_prefilling: np.ndarray,
    config: MInferenceConfig,
    dense_reason: Reason | None = None,
    find_step_reason: Callable[[], Reason | None] | None = None,
) -> Plan:
    """Split a step into sparse chunks and dense runs. Costs little for a step of decode rows, however many.

    A request's last prompt token alone, all that a prefix cache may leave of it, is a decode row in all but name, and
    is not counted.

    Args:
        query_start_loc: [num_reqs + 1] int, first query row of each request.
        seq_lens: [num_reqs] int, keys of each request, its rows of this step included; exact for prefill rows.
        is_prefilling: [num_reqs] bool, whether the request still reads its prompt.
        config: the gate.
        dense_reason: set when something about the layers forbids sparse attention.
        find_step_reason: says what about the step forbids it; called only if a chunk passes the gate.
    """
    requests = is_prefilling.nonzero()[0]
    tally: dict[Reason, tuple[int, int]] = {}
    if len(requests) > FEW:
        requests = _turn_away(requests, query_start_loc, seq_lens, config, dense_reason, tally)
    chunks: list[SparseChunk] = []
    for request in requests.tolist():
        # item: NumPy's own numbers cost as much as all else here.
        start, seq_len = query_start_loc.item(request), seq_lens.item(request)
        rows = query_start_loc.item(request + 1) - start
        if rows <= 1:  # padding has none
            continue
        reason = dense_reason or _gate(rows, seq_len, config)
        if reason is Reason.GATE_OPEN and find_step_reason is not None:
            reason = find_step_reason() or reason
        if reason is Reason.GATE_OPEN:
            chunks.append(SparseChunk(request, start, rows, seq_len - rows))
        tokens, count = tally.get(reason, (0, 0))
        tally[reason] = tokens + rows, count + 1
    dense_runs = _gaps(chunks, query_start_loc, seq_lens) if chunks else ()
    labels = {reason: (_path(reason), reason) for reason in tally}
    return Plan(
        tuple(chunks),
        dense_runs,
        {labels[reason]: tokens for reason, (tokens, _) in tally.items()},
        {labels[reason]: count for reason, (_, count) in tally.items()},
    )


def _path(reason: Reason) -> Path:
    return "sparse" if reason is Reason.GATE_OPEN else "dense"


def _turn_away(
    requests: np.ndarray,
    query_start_loc: np.ndarray,
    seq_lens: np.ndarray,
    config: MInferenceConfig,
    dense_reason: Reason | None,
    tally: dict[Reason, tuple[int, int]],
) -> np.ndarray:
    """Look at all requests at once: add rows and number of those that stay dense to `tally`, return the others."""
    rows = query_start_loc[requests + 1] - query_start_loc[requests]
    is_prefill = rows > 1
    if dense_reason:
        passes, groups = np.zeros_like(is_prefill), {dense_reason: is_prefill}
    else:
        is_long = seq_lens[requests] >= config.min_seq_len
        passes = is_prefill & is_long & (rows >= config.min_chunk)
        groups = {
            Reason.BELOW_MIN_SEQ_LEN: is_prefill & ~is_long,
            Reason.SHORT_CHUNK: is_prefill & is_long & ~passes,
        }
    for reason, group in groups.items():
        if count := int(np.count_nonzero(group)):
            tally[reason] = int(rows[group].sum()), count
    return requests[passes]


def _gate(rows: int, seq_len: int, config: MInferenceConfig) -> Reason:
    if seq_len < config.min_seq_len:
        return Reason.BELOW_MIN_SEQ_LEN
    if rows < config.min_chunk:
        return Reason.SHORT_CHUNK
    return Reason.GATE_OPEN


def _gaps(chunks: list[SparseChunk], query_start_loc: np.ndarray, seq_lens: np.ndarray) -> tuple[DenseRun, ...]:
    """The requests before, between and after the sparse ones, as runs of neighbours."""
    runs = []
    edges = [-1, *(chunk.request for chunk in chunks), len(seq_lens)]
    for before, end in pairwise(edges):
        first = before + 1
        if query_start_loc[end] > query_start_loc[first]:
            runs.append(
                DenseRun(
                    first=first,
                    end=end,
                    query_start=int(query_start_loc[first]),
                    query_end=int(query_start_loc[end]),
                    max_query_len=int(np.diff(query_start_loc[first : end + 1]).max()),
                    max_seq_len=int(seq_lens[first:end].max()),
                )
            )
    return tuple(runs)
