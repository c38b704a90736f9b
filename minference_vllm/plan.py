# SPDX-License-Identifier: Apache-2.0
"""What runs sparse and what dense: every rule, for layers, steps and the rows of a step, from host data alone."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import compress, pairwise
from typing import NamedTuple

from minference_vllm.budget import Budget
from minference_vllm.config import MInferenceConfig
from minference_vllm.reason import Reason

SUPPORTED_HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True, slots=True)
class LayerTraits:
    """The properties of an attention layer that decide whether it may ever run sparse."""

    is_decoder: bool
    has_sliding_window: bool
    attends_within_chunks: bool
    has_alibi: bool
    has_soft_cap: bool
    has_other_quantization: bool
    """The cache is quantized, but not to FP8 (e4m3) with one scale for the layer or one for each KV head."""
    has_other_dtype: bool
    """The cache is not quantized to a supported FP8, and its dtype is not the model's."""
    shares_kv: bool
    is_context_parallel: bool
    is_micro_batched: bool
    is_batch_invariant: bool
    is_draft: bool
    is_kept_dense: bool
    """By the setting dense_layers or a pattern file."""
    head_dim: int

    @property
    def dense_reason(self) -> Reason | None:
        """The first rule that keeps the layer dense, None if it may run sparse."""
        return next((reason for reason, applies in _LAYER_RULES if applies(self)), None)


_LAYER_RULES: tuple[tuple[Reason, Callable[[LayerTraits], bool]], ...] = (
    (Reason.NOT_DECODER, lambda layer: not layer.is_decoder),
    (Reason.SLIDING_WINDOW, lambda layer: layer.has_sliding_window),
    (Reason.ALIBI, lambda layer: layer.has_alibi),
    (Reason.SOFT_CAP, lambda layer: layer.has_soft_cap),
    (Reason.QUANTIZED_KV, lambda layer: layer.has_other_quantization),
    (Reason.KV_SHARING, lambda layer: layer.shares_kv),
    (Reason.CONTEXT_PARALLEL, lambda layer: layer.is_context_parallel),
    # Micro-batches run concurrently, and would overwrite each other's data in the one scratch that they share.
    (Reason.MICRO_BATCHING, lambda layer: layer.is_micro_batched),
    (Reason.BATCH_INVARIANT, lambda layer: layer.is_batch_invariant),
    (Reason.HEAD_DIM, lambda layer: layer.head_dim not in SUPPORTED_HEAD_DIMS),
    (Reason.DRAFT_LAYER, lambda layer: layer.is_draft),
    (Reason.DENSE_LAYER, lambda layer: layer.is_kept_dense),
    # For such a layer vLLM cuts the requests into another batch, without prefill flags and lengths of whole prompts.
    (Reason.CHUNKED_LOCAL, lambda layer: layer.attends_within_chunks),
    (Reason.DTYPE, lambda layer: layer.has_other_dtype),
)


@dataclass(frozen=True, slots=True)
class StepTraits:
    """The properties of a step that decide whether anything of it may run sparse."""

    is_causal: bool
    is_fast_prefill: bool
    has_mm_prefix: bool
    has_rswa: bool

    @property
    def dense_reason(self) -> Reason | None:
        """The first rule that keeps the step dense, None if chunks of it may run sparse."""
        return next((reason for reason, applies in _STEP_RULES if applies(self)), None)


_STEP_RULES: tuple[tuple[Reason, Callable[[StepTraits], bool]], ...] = (
    (Reason.NOT_CAUSAL, lambda step: not step.is_causal),
    (Reason.FAST_PREFILL, lambda step: step.is_fast_prefill),
    (Reason.MM_PREFIX, lambda step: step.has_mm_prefix),
    (Reason.RSWA, lambda step: step.has_rswa),
)


class SparseChunk(NamedTuple):
    """One request's rows of this step, to run sparse.

    Attributes:
        request: row of the request in the step's block table.
        query_start: its first row in the step's query tensor.
        num_rows: query rows.
        context_len: keys before the chunk.
        may_end_prompt: whether this may be the last chunk of the request's prompt.
    """

    request: int
    query_start: int
    num_rows: int
    context_len: int
    may_end_prompt: bool = True

    @property
    def seq_len(self) -> int:
        return self.context_len + self.num_rows


class DenseRun(NamedTuple):
    """Neighbouring requests to run dense: requests [first, end), query rows [query_start, query_end)."""

    first: int
    end: int
    query_start: int
    query_end: int
    max_query_len: int
    max_seq_len: int

    @classmethod
    def of_chunk(cls, chunk: SparseChunk) -> "DenseRun":
        """The same rows, to run dense after all."""
        end = chunk.query_start + chunk.num_rows
        return cls(chunk.request, chunk.request + 1, chunk.query_start, end, chunk.num_rows, chunk.seq_len)


class Requests(NamedTuple):
    """The requests of a step.

    Attributes:
        starts: [num_reqs + 1] first query row of each.
        seq_lens: [num_reqs] keys of each, its rows of this step included; exact for prefill rows. Empty if all requests
            are below the gate: then nobody needs the lengths.
        is_prefilling: [num_reqs] whether the request still reads its prompt. May be shorter than the other lists if
            padding follows, or longer.
    """

    starts: list[int]
    seq_lens: list[int]
    is_prefilling: list[bool]

    @property
    def bounds(self) -> list[int]:
        """`starts` without the padding that follows the requests whose lengths are known."""
        return self.starts[: len(self.seq_lens) + 1] if self.seq_lens else self.starts

    def prompts(self) -> Iterator[tuple[int, int, int]]:
        """Number, query rows and keys of each request that does prefill; 0 keys if the lengths are not known.

        A single row does not count as prefill, even if it is a prompt's last token (a prefix cache may leave only
        that): it runs as a decode row does.
        """
        for request in compress(range(len(self.starts) - 1), self.is_prefilling):
            rows = self.starts[request + 1] - self.starts[request]
            if rows > 1:  # padding has none
                yield request, rows, self.seq_lens[request] if self.seq_lens else 0


class Plan(NamedTuple):
    """What a step does. `chunks` is empty when the whole step runs dense, as if the plugin were not there.

    Attributes:
        chunks: what runs sparse.
        dense_runs: the other rows, if anything runs sparse.
    """

    chunks: tuple[SparseChunk, ...] = ()
    dense_runs: tuple[DenseRun, ...] = ()


ALL_DENSE = Plan()


def make_plan(requests: Requests, config: MInferenceConfig, budget: Budget) -> Plan:
    """Split a step into sparse chunks and dense runs.

    Args:
        requests: of the step, with their lengths.
        config: the gate.
        budget: the scheduler's limits, by which it cuts prompts into chunks.
    """
    prompts = list(requests.prompts())
    # vLLM does not tell where a prompt ends, but a chunk that it cuts fills the step's budget. If there are several
    # prompts in a full step, only one of them is cut, and the step does not show which: then each may end here.
    is_full = len(prompts) == 1 and budget.is_spent(requests.bounds)
    chunks = tuple(
        SparseChunk(
            request,
            requests.starts[request],
            rows,
            context_len=seq_len - rows,
            may_end_prompt=not (is_full or budget.is_cut(rows, seq_len)),
        )
        for request, rows, seq_len in prompts
        if gate(rows, seq_len, config) is Reason.GATE_OPEN
    )
    return Plan(chunks, _dense_runs(chunks, requests)) if chunks else ALL_DENSE


def cut_prompts(requests: Requests, budget: Budget) -> set[int]:
    """The requests of a step whose prompts go on in a later step, as far as can be told.

    In a full step one prompt is cut: the one that was scheduled last. We assume that it is the prompt with the shortest
    context, and of several such the last in the batch; if no lengths are known, the last in the batch.
    """
    prompts = list(requests.prompts())
    cut = {request for request, rows, seq_len in prompts if budget.is_cut(rows, seq_len)}
    if prompts and budget.is_spent(requests.bounds):
        last = min(prompts, key=lambda prompt: (prompt[2] and prompt[2] - prompt[1], -prompt[0]))
        cut.add(last[0])
    return cut


def gate(rows: int, seq_len: int, config: MInferenceConfig) -> Reason:
    """The reason why a chunk of `rows` rows runs sparse or dense, in a request of `seq_len` keys, by the gate alone."""
    if seq_len < config.min_seq_len:
        return Reason.BELOW_MIN_SEQ_LEN
    if rows < config.min_chunk:
        return Reason.SHORT_CHUNK
    return Reason.GATE_OPEN


def _dense_runs(chunks: tuple[SparseChunk, ...], requests: Requests) -> tuple[DenseRun, ...]:
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
