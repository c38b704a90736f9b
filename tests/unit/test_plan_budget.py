# SPDX-License-Identifier: Apache-2.0
"""Which chunks may end their prompts, as far as the scheduler's budget tells."""

from minference_vllm.budget import Budget
from minference_vllm.plan import make_plan
from tests.unit.test_plan import CONFIG, DECODE, PADDING, SHORT, Row, requests_of


def ends(*batch: Row, tokens: int = 4096, rows: int = 4096) -> list[bool]:
    """Which of a step's sparse chunks may end their prompts."""
    plan = make_plan(requests_of(batch), CONFIG, Budget(tokens, rows))
    return [chunk.may_end_prompt for chunk in plan.chunks]


def test_a_chunk_that_fills_the_step_alone_is_taken_for_a_part_of_its_prompt() -> None:
    assert ends(Row(4096, 4096)) == [False]
    assert ends(Row(4095, 4096)) == [True]
    assert ends(DECODE, DECODE, Row(4094, 4096)) == [False], "decode rows are of the budget too"
    assert ends(DECODE, Row(4094, 4096), PADDING, PADDING) == [True]


def test_of_several_prompts_in_a_full_step_each_may_end() -> None:
    assert ends(Row(2000, 4096), Row(2096, 4096)) == [True, True]
    assert ends(SHORT, Row(4036, 4096)) == [True]


def test_a_chunk_as_long_as_the_scheduler_lets_it_be_is_taken_for_a_part() -> None:
    assert ends(Row(1024, 4096), Row(1000, 4096), rows=1024) == [False, True]


def test_a_request_that_is_alone_is_not_cut_to_what_requests_beside_others_get() -> None:
    assert ends(Row(1500, 4096), rows=1024) == [True]


def ends_with_drafts(*batch: Row) -> list[bool]:
    """The same where a draft model takes one more token of the step's budget for each request."""
    plan = make_plan(requests_of(batch), CONFIG, Budget(8192, 8192, slots=1))
    return [chunk.may_end_prompt for chunk in plan.chunks]


def test_what_drafts_take_of_a_step_is_of_its_budget() -> None:
    assert ends_with_drafts(Row(8191, 31_809)) == [False]
    assert ends_with_drafts(Row(8190, 31_809)) == [True]
    assert ends_with_drafts(DECODE, DECODE, Row(8187, 4096), PADDING) == [False]
    assert ends_with_drafts(DECODE, DECODE, Row(8186, 4096), PADDING) == [True], "padding has no drafts"
    assert ends_with_drafts(Row(2000, 4096), Row(6190, 4096)) == [True, True], "which of them is cut cannot be seen"


def test_where_chunks_end_at_multiples_of_a_block_such_an_end_is_not_the_prompts() -> None:
    budget = Budget(8192, 8192, grain=544)
    batches = (Row(8160, 0),), (Row(1632, 8160),), (Row(1000, 9792),), (Row(8160, 0), Row(1000, 1088))
    plans = [make_plan(requests_of(batch), CONFIG, budget) for batch in batches]
    found = [[chunk.may_end_prompt for chunk in plan.chunks] for plan in plans]
    assert found == [[False], [False], [True], [False, True]]


def test_what_the_scheduler_may_give_out_can_be_less_than_what_fits_a_step() -> None:
    plan = make_plan(requests_of((Row(4096, 4096),)), CONFIG, Budget(8192, 8192, scheduled=4096))
    assert [chunk.may_end_prompt for chunk in plan.chunks] == [False]
