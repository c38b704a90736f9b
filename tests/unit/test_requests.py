# SPDX-License-Identifier: Apache-2.0
"""Requests are counted once, where the end of their prompts is read, by where and why that ran."""

from collections import Counter
from dataclasses import dataclass

import pytest

from minference_vllm.budget import Budget
from minference_vllm.plan import Requests, cut_prompts
from minference_vllm.reason import Reason
from minference_vllm.record import StepRecord, UntoldStep
from tests.unit.test_plan import CONFIG, DECODE, OPEN, PADDING, SHORT_CHUNK, TOO_SHORT, Row, requests_of

STEP = 4096
BUDGET = Budget(STEP, STEP)


def ended(*batch: Row, budget: Budget = BUDGET, before: Reason = Reason.SHORT_CHUNK, **reasons: object) -> Counter:
    """Requests by path and reason that a step counts; `before`: see StepRecord.tally."""
    tally = StepRecord("a group", *requests_of(batch), **reasons).tally(CONFIG, budget, before)
    return +Counter({label: requests for label, (_, _, requests) in tally.items()})


@pytest.mark.parametrize(
    ("row", "label"),
    [
        pytest.param(Row(500), TOO_SHORT, id="a short prompt"),
        pytest.param(Row(1000), OPEN, id="a long one in one chunk"),
        pytest.param(Row(300, 4096), OPEN, id="what is left of a long one"),
        pytest.param(Row(50, 900), TOO_SHORT, id="below the gate in several chunks"),
        pytest.param(Row(60, 950), SHORT_CHUNK, id="a short chunk that passes the gate by itself"),
    ],
)
def test_a_prompt_is_counted_by_its_last_chunk(row: Row, label: tuple[str, str]) -> None:
    assert ended(row) == {label: 1}


def test_a_chunk_that_fills_the_step_is_not_the_last() -> None:
    assert ended(Row(STEP, STEP)) == {}
    assert ended(DECODE, DECODE, Row(STEP - 2), PADDING) == {}
    assert ended(Row(STEP - 1), budget=Budget(STEP, STEP, slots=1)) == {}


def test_of_several_prompts_that_fill_a_step_the_newest_is_cut() -> None:
    assert ended(Row(3000), Row(1096, STEP)) == {OPEN: 1}
    assert ended(Row(600, 2 * STEP), Row(STEP - 1100), Row(500)) == {OPEN: 2}


def test_a_chunk_of_the_most_rows_beside_others_is_not_the_last() -> None:
    assert ended(Row(1024, STEP), Row(1000, STEP), budget=Budget(STEP, 1024)) == {OPEN: 1}


def test_where_chunks_end_at_multiples_of_a_block_a_prompt_counts_once() -> None:
    budget = Budget(STEP, STEP, grain=544)
    batches = (Row(3808),), (Row(3808, 3808),), (Row(544, 7616),), (Row(300, 8160),)
    counted = sum((ended(*batch, budget=budget, before=Reason.GATE_OPEN) for batch in batches), Counter())
    assert counted == {OPEN: 1}
    assert ended(Row(544), Row(300), budget=budget) == {TOO_SHORT: 1}


def test_below_the_gate_lengths_are_not_needed() -> None:
    for batch, requests in (((DECODE, Row(20), Row(30)), 2), ((Row(STEP - 30), Row(30)), 1)):
        without = requests_of(batch)._replace(seq_lens=[])
        assert StepRecord("a group", *without).tally(CONFIG, BUDGET)[TOO_SHORT][2] == requests


def test_of_prompts_without_lengths_the_last_is_cut() -> None:
    assert cut_prompts(Requests([0, 5000, 8192], [], [True, True]), Budget(8192, 8192)) == {1}


def test_a_short_rest_counts_as_what_passed_the_gate_before() -> None:
    rest = Row(50, STEP)
    for reason in (Reason.GATE_OPEN, Reason.MM_PREFIX, Reason.SPARSE_FAULT):
        path = "sparse" if reason is Reason.GATE_OPEN else "dense"
        assert ended(rest, before=reason) == {(path, reason.value): 1}
    assert ended(rest) == {SHORT_CHUNK: 1}, "nothing has passed the gate on this server"
    tally = StepRecord("a group", *requests_of((rest,))).tally(CONFIG, BUDGET, Reason.GATE_OPEN)
    assert tally == {SHORT_CHUNK: (50, 1, 0), OPEN: (0, 0, 1)}, "its tokens ran dense"


def test_reasons_of_layers_steps_and_faults_are_the_requests() -> None:
    assert ended(Row(2000), layer_reason=Reason.HEAD_DIM) == {("dense", "head_dim"): 1}
    assert ended(Row(2000), Row(30), step_reason=Reason.NOT_CAUSAL) == {("dense", "not_causal"): 1, TOO_SHORT: 1}
    assert ended(Row(2000), failed={0}) == {("dense", "sparse_fault"): 1}


def test_a_step_whose_requests_cannot_be_told_apart_counts_none() -> None:
    assert UntoldStep("a group", 5000, Reason.NO_HOST_METADATA).tally(CONFIG) == {
        ("dense", "no_host_metadata"): (5000, 1, 0)
    }


# A scheduler


@dataclass
class Request:
    prompt: int
    read: int = 0


def steps_of(prompts: list[int]) -> list[tuple[Row, ...]]:
    """How vLLM cuts prompts that wait from the first step on, oldest first."""
    waiting, steps = [Request(prompt) for prompt in prompts], []
    while any(request.read < request.prompt for request in waiting):
        left, batch = STEP, []
        for request in waiting:
            rows = min(left, request.prompt - request.read)
            if rows:
                batch.append(Row(rows, request.read))
                request.read, left = request.read + rows, left - rows
        steps.append(tuple(batch))
    return steps


def test_each_request_is_counted_once() -> None:
    prompts = [300, 9000, 40, 20_001, 5000, 950, 777, 4500]
    before, counted = Reason.SHORT_CHUNK, Counter()
    for batch in steps_of(prompts):
        counted += ended(*batch, before=before)
        if any(row.rows >= CONFIG.min_chunk and row.rows + row.context_len >= CONFIG.min_seq_len for row in batch):
            before = Reason.GATE_OPEN
    assert counted == {OPEN: 4, TOO_SHORT: 4}
