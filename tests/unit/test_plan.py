# SPDX-License-Identifier: Apache-2.0
"""Which rows of a step go sparse, and what is counted, on batches as vLLM's two model runners build them."""

import random
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch

from minference_vllm.budget import Budget
from minference_vllm.config import MInferenceConfig
from minference_vllm.plan import ALL_DENSE, DenseRun, Plan, Requests, SparseChunk, make_plan
from minference_vllm.reason import Reason
from minference_vllm.record import StepRecord, Tally, UntoldStep

CONFIG = MInferenceConfig(min_seq_len=1000, min_chunk=100)
OPEN = ("sparse", "gate_open")
TOO_SHORT = ("dense", "below_min_seq_len")
SHORT_CHUNK = ("dense", "short_chunk")


@dataclass(frozen=True)
class Row:
    """One request of a step: its query rows, the keys before them, and whether it still reads its prompt."""

    rows: int
    context_len: int = 0
    prefill: bool = True


DECODE = Row(1, 5000, prefill=False)
SHORT = Row(60)
LONG = Row(2000)
LATER_CHUNK = Row(512, 4096)
SHORT_TAIL = Row(99, 4096)
PADDING = Row(0, prefill=False)
BUDGET = Budget(10**6, 10**6)


def plan_of(*batch: Row) -> Plan:
    return make_plan(requests_of(batch), CONFIG, BUDGET)


def tally_of(*batch: Row, config: MInferenceConfig = CONFIG, **changes: object) -> Tally:
    return StepRecord("a group", *requests_of(batch), **changes).tally(config)


def requests_of(batch: tuple[Row, ...]) -> Requests:
    starts = list(accumulate((row.rows for row in batch), initial=0))
    seq_lens = [row.context_len + row.rows for row in batch]
    return Requests(starts, seq_lens, [row.prefill for row in batch])


def check(plan: Plan, batch: tuple[Row, ...], config: MInferenceConfig = CONFIG) -> None:
    """Compare a plan, and what is counted, with the rule applied to one query row at a time."""
    path_of_row: list[str] = []
    request_of_row: list[int] = []
    tokens: Counter[tuple[str, str]] = Counter()
    counts: Counter[tuple[str, str]] = Counter()
    chunks = []
    for request, row in enumerate(batch):
        seq_len = row.context_len + row.rows
        if seq_len < config.min_seq_len:
            label = TOO_SHORT
        elif row.rows < config.min_chunk:
            label = SHORT_CHUNK
        else:
            label = OPEN
        is_prefill = row.prefill and row.rows > 1
        sparse = is_prefill and label == OPEN
        if sparse:
            chunks.append(SparseChunk(request, len(path_of_row), row.rows, row.context_len))
        if is_prefill:
            counts[label] += 1
        for _ in range(row.rows):
            path_of_row.append("sparse" if sparse else "dense")
            request_of_row.append(request)
            tokens[label] += is_prefill
    assert plan.chunks == tuple(chunks)
    assert tally_of(*batch, config=config) == {label: (tokens[label], count, count) for label, count in counts.items()}
    if chunks:
        check_runs(plan.dense_runs, path_of_row, request_of_row, batch)
    else:
        assert plan.dense_runs == ()


def check_runs(
    runs: tuple[DenseRun, ...], path_of_row: list[str], request_of_row: list[int], batch: tuple[Row, ...]
) -> None:
    """The runs hold every dense row once, in order; none could be longer; their bounds are those of their requests."""
    held = [row for run in runs for row in range(run.query_start, run.query_end)]
    assert held == [row for row, path in enumerate(path_of_row) if path == "dense"]
    for run in runs:
        assert run.query_start < run.query_end
        assert run.query_start == 0 or path_of_row[run.query_start - 1] == "sparse"
        assert run.query_end == len(path_of_row) or path_of_row[run.query_end] == "sparse"
        inside = set(request_of_row[run.query_start : run.query_end])
        assert inside <= set(range(run.first, run.end))
        assert all(batch[request].rows == 0 for request in set(range(run.first, run.end)) - inside)
        assert run.max_query_len == max(batch[request].rows for request in inside)
        assert run.max_seq_len == max(batch[request].context_len + batch[request].rows for request in inside)


@pytest.mark.parametrize(
    ("row", "label"),
    [
        pytest.param(Row(1000), OPEN, id="prompt of exactly min_seq_len"),
        pytest.param(Row(999), TOO_SHORT, id="prompt one token shorter"),
        pytest.param(Row(100, 900), OPEN, id="chunk of exactly min_chunk that reaches min_seq_len"),
        pytest.param(Row(100, 899), TOO_SHORT, id="chunk that stays below min_seq_len"),
        pytest.param(Row(99, 5000), SHORT_CHUNK, id="chunk one row shorter than min_chunk"),
        pytest.param(Row(2, 5000), SHORT_CHUNK, id="last tokens of a prompt"),
        pytest.param(Row(50, 50), TOO_SHORT, id="short in both: the prompt is what the user sees"),
    ],
)
def test_the_gate(row: Row, label: tuple[str, Reason]) -> None:
    plan = plan_of(row)
    assert tally_of(row) == {label: (row.rows, 1, 1)}
    assert bool(plan.chunks) == (label == OPEN)
    check(plan, (row,))


@pytest.mark.parametrize("reason", [reason for reason in Reason if reason is not Reason.GATE_OPEN])
def test_a_reason_of_the_layers_is_counted_for_all_prompts(reason: Reason) -> None:
    tokens = LONG.rows + SHORT.rows + LATER_CHUNK.rows
    assert tally_of(DECODE, LONG, SHORT, LATER_CHUNK, layer_reason=reason) == {("dense", reason.value): (tokens, 3, 3)}


def test_a_reason_of_the_step_is_counted_for_chunks_that_pass_the_gate() -> None:
    counts = tally_of(DECODE, SHORT, LONG, step_reason=Reason.NOT_CAUSAL)
    assert counts == {TOO_SHORT: (SHORT.rows, 1, 1), ("dense", "not_causal"): (LONG.rows, 1, 1)}


def test_requests_that_failed_are_counted_as_faults() -> None:
    counts = tally_of(LONG, DECODE, LATER_CHUNK, failed={2})
    assert counts == {OPEN: (LONG.rows, 1, 1), ("dense", "sparse_fault"): (LATER_CHUNK.rows, 1, 1)}


def test_a_step_that_cannot_be_told_apart_counts_as_one_chunk() -> None:
    assert UntoldStep("a group", 5000, Reason.NO_HOST_METADATA).tally(CONFIG) == {
        ("dense", "no_host_metadata"): (5000, 1, 0)
    }


def test_below_the_gate_lengths_are_not_needed() -> None:
    batch = (DECODE, SHORT, SHORT)
    without = requests_of(batch)._replace(seq_lens=[])
    assert StepRecord("a group", *without).tally(CONFIG) == tally_of(*batch) == {TOO_SHORT: (120, 2, 2)}


def test_a_record_may_hold_the_tensors_that_describe_the_step() -> None:
    batch = (DECODE, LONG, SHORT)
    tensors = [torch.tensor(field) for field in requests_of(batch)]
    assert StepRecord("a group", *tensors).tally(CONFIG) == tally_of(*batch)


def test_rows_that_run_dense_after_all_are_a_run_of_their_own() -> None:
    run = DenseRun.of_chunk(SparseChunk(request=3, query_start=11, num_rows=512, context_len=4096))
    assert run == DenseRun(first=3, end=4, query_start=11, query_end=523, max_query_len=512, max_seq_len=4608)


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param((LONG,), id="one long prompt"),
        pytest.param((DECODE, DECODE, DECODE, SHORT, LONG), id="V2 order: decode, short, long"),
        pytest.param((DECODE, SHORT, LONG, LATER_CHUNK, LONG), id="V2 order: several long prompts"),
        pytest.param((LONG, DECODE, LATER_CHUNK, SHORT, DECODE), id="V1 order: long first"),
        pytest.param((DECODE, LONG, DECODE, LONG, DECODE), id="V1 order: alternating"),
        pytest.param((LONG, LATER_CHUNK, LONG), id="all sparse"),
        pytest.param((LONG, DECODE, SHORT, SHORT_TAIL, DECODE, LONG), id="one dense run inside"),
        pytest.param((LONG, PADDING, PADDING, PADDING), id="padding at the end"),
        pytest.param((DECODE, PADDING, LONG, PADDING, SHORT), id="empty requests in between"),
        pytest.param((PADDING, LONG), id="empty request first"),
    ],
)
def test_mixed_batches_are_split(batch: tuple[Row, ...]) -> None:
    plan = plan_of(*batch)
    assert plan.chunks
    check(plan, batch)


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param((), id="no request"),
        pytest.param((DECODE,) * 7, id="decode"),
        pytest.param((DECODE, SHORT, SHORT_TAIL), id="decode and short prefill"),
        pytest.param((PADDING,) * 4, id="padding"),
    ],
)
def test_a_step_without_a_long_chunk_is_left_whole(batch: tuple[Row, ...]) -> None:
    plan = plan_of(*batch)
    assert (plan.chunks, plan.dense_runs) == ((), ())
    check(plan, batch)


def test_a_dense_run_is_described_by_its_own_requests() -> None:
    plan = plan_of(LONG, DECODE, SHORT, LATER_CHUNK, DECODE)
    assert plan.dense_runs == (
        DenseRun(first=1, end=3, query_start=2000, query_end=2061, max_query_len=60, max_seq_len=5001),
        DenseRun(first=4, end=5, query_start=2573, query_end=2574, max_query_len=1, max_seq_len=5001),
    )


def test_a_prefix_cache_hit_with_a_short_tail_is_dense() -> None:
    assert tally_of(Row(56, 2944)) == {SHORT_CHUNK: (56, 1, 1)}


def test_a_prefix_cache_hit_with_a_long_tail_is_sparse_after_its_context() -> None:
    assert plan_of(Row(500, 2944)).chunks == (SparseChunk(0, 0, 500, 2944),)


def test_a_resumed_request_past_its_prompt_is_dense_and_not_counted_as_prefill() -> None:
    # vLLM's V1 runner recomputes a preempted request in chunks; past the prompt they are not prefilling.
    resumed = Row(2000, 3000, prefill=False)
    assert plan_of(resumed) is ALL_DENSE
    assert tally_of(resumed) == {}
    assert tally_of(resumed, LONG) == {OPEN: (LONG.rows, 1, 1)}
    check(plan_of(resumed, LONG), (resumed, LONG))


def test_the_last_token_of_a_prompt_is_a_decode_row() -> None:
    assert plan_of(Row(1, 5000)) == plan_of(DECODE)
    assert plan_of(Row(1, 5000), LONG) == plan_of(DECODE, LONG)
    assert tally_of(Row(1, 5000), LONG) == tally_of(DECODE, LONG)


def test_an_empty_request_that_is_prefilling_is_not_counted() -> None:
    assert tally_of(Row(0, 5000), LONG) == {OPEN: (LONG.rows, 1, 1)}


def test_flags_may_lack_the_padding_rows() -> None:
    batch = (DECODE, LONG, PADDING, PADDING)
    requests = requests_of(batch)._replace(is_prefilling=[False, True])
    assert make_plan(requests, CONFIG, BUDGET) == plan_of(*batch)
    assert StepRecord("a group", *requests).tally(CONFIG) == tally_of(*batch)
    assert plan_of(*batch).chunks


def test_flags_beyond_the_requests_are_not_looked_at() -> None:
    requests = requests_of((LONG, SHORT))
    stale = requests._replace(is_prefilling=[*requests.is_prefilling, True, True])
    assert StepRecord("a group", *stale).tally(CONFIG) == tally_of(LONG, SHORT)
    assert make_plan(stale, CONFIG, BUDGET) == make_plan(requests, CONFIG, BUDGET)


def test_a_gate_of_zero_takes_every_prompt_of_min_chunk_rows() -> None:
    config = MInferenceConfig(min_seq_len=0, min_chunk=1)
    batch = (DECODE, Row(2), SHORT, PADDING, Row(1, 3), Row(2, 3))
    plan = make_plan(requests_of(batch), config, BUDGET)
    assert [chunk.request for chunk in plan.chunks] == [1, 2, 5]
    check(plan, batch, config)


def random_row(generator: random.Random) -> Row:
    """A request near the gate's edges, one in eleven of them padding."""
    rows = generator.choice([0, 1, 1, 4, 99, 100, 101, 500, 999, 1000, 1500])
    context_len = generator.choice([0, 0, 16, 899, 900, 901, 4096])
    return Row(rows, context_len if rows else 0, prefill=generator.random() < 0.7)


def test_random_batches_agree_with_the_rule_applied_row_by_row() -> None:
    generator = random.Random(0)
    sparse_steps = 0
    for _ in range(400):
        batch = tuple(random_row(generator) for _ in range(generator.choice([generator.randint(0, 12), 60])))
        plan = plan_of(*batch)
        check(plan, batch)
        sparse_steps += bool(plan.chunks)
    assert sparse_steps > 100
