# SPDX-License-Identifier: Apache-2.0
"""Which rows of a step go sparse: decided once a step, from host data alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import compress, pairwise
from typing import Any, NamedTuple

from minference_vllm.config import MInferenceConfig


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


class Requests(NamedTuple):
    """The requests of a step, copied from vLLM's host tensors, which the next step overwrites.

    Attributes:
        starts: [num_reqs + 1] first query row of each.
        seq_lens: [num_reqs] keys of each, its rows of this step included; exact for prefill rows. Any that lack
            count as below the gate: nobody asks if all are, or if none is known.
        is_prefilling: [num_reqs] whether it still reads its prompt; padding rows may lack, or lie beyond `starts`.
        layer_reason: what about the layers forbids sparse attention.
        step_reason: what about the step forbids it to chunks that pass the gate.
    """

    starts: list[int]
    seq_lens: list[int]
    is_prefilling: list[bool]
    layer_reason: Reason | None = None
    step_reason: Reason | None = None

    @classmethod
    def unknown(cls, tokens: int, reason: Reason) -> "Requests":
        """A step whose rows cannot be told apart: they count as one chunk, dense for this reason."""
        return cls([0, tokens], [], [True], reason)

    def prompts(self) -> Iterator[tuple[int, int, int]]:
        """Request, rows and keys of what is prefill.

        A request's last prompt token alone, all that a prefix cache may leave of it, is a decode row in all but name.
        """
        for request in compress(range(len(self.starts) - 1), self.is_prefilling):
            rows = self.starts[request + 1] - self.starts[request]
            if rows > 1:  # padding has none
                yield request, rows, self.seq_lens[request] if request < len(self.seq_lens) else 0

    def reason(self, rows: int, seq_len: int, config: MInferenceConfig) -> Reason:
        """Why this many rows of a request with this many keys run where they run."""
        if self.layer_reason is not None:
            return self.layer_reason
        if seq_len < config.min_seq_len:
            return Reason.BELOW_MIN_SEQ_LEN
        if rows < config.min_chunk:
            return Reason.SHORT_CHUNK
        return self.step_reason or Reason.GATE_OPEN


class Plan(NamedTuple):
    """What a step does. `chunks` is empty when the whole step runs dense, as if the plugin were not there.

    Attributes:
        chunks: what runs sparse.
        dense_runs: the other rows, if anything runs sparse.
    """

    chunks: tuple[SparseChunk, ...] = ()
    dense_runs: tuple[DenseRun, ...] = ()


ALL_DENSE = Plan()


@dataclass(frozen=True, slots=True)
class Step:
    """A step in which something runs sparse; the attribute `minference` of vLLM's metadata, which else has none.

    Attributes:
        chunks: requests' rows that run sparse.
        dense_runs: the other rows, in runs of neighbouring requests, each with the metadata of a batch of its own.
    """

    chunks: tuple[SparseChunk, ...]
    dense_runs: tuple[tuple[DenseRun, Any], ...]


def make_plan(requests: Requests, config: MInferenceConfig) -> Plan:
    """Split a step into sparse chunks and dense runs.

    Args:
        requests: of the step, with their lengths.
        config: the gate.
    """
    chunks = tuple(
        SparseChunk(request, requests.starts[request], rows, seq_len - rows)
        for request, rows, seq_len in requests.prompts()
        if requests.reason(rows, seq_len, config) is Reason.GATE_OPEN
    )
    return Plan(chunks, _gaps(chunks, requests)) if chunks else ALL_DENSE


def tally(requests: Requests, config: MInferenceConfig) -> dict[tuple[str, str], tuple[int, int]]:
    """Prefill tokens of a step, and its chunks (requests' shares), by path and reason; decode rows are not prefill."""
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for _, rows, seq_len in requests.prompts():
        reason = requests.reason(rows, seq_len, config)
        label = "sparse" if reason is Reason.GATE_OPEN else "dense", reason.value
        tokens, chunks = counts.get(label, (0, 0))
        counts[label] = tokens + rows, chunks + 1
    return counts


def _gaps(chunks: tuple[SparseChunk, ...], requests: Requests) -> tuple[DenseRun, ...]:
    """The requests before, between and after the sparse ones, as runs of neighbours."""
    runs = []
    starts, seq_lens = requests.starts, requests.seq_lens
    edges = [-1, *(chunk.request for chunk in chunks), len(seq_lens)]
    for before, end in pairwise(edges):
        first = before + 1
        if starts[end] > starts[first]:
            rows = (after - start for start, after in pairwise(starts[first : end + 1]))
            runs.append(DenseRun(first, end, starts[first], starts[end], max(rows), max(seq_lens[first:end])))
    return tuple(runs)
