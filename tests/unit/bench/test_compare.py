# SPDX-License-Identifier: Apache-2.0
"""Percentiles and their intervals: against numpy's, and where the truth is known."""

import numpy
import pytest

from minference_vllm.bench import compare as module
from minference_vllm.bench.compare import METRICS, PERCENTILES, _Pool, compare
from minference_vllm.bench.request import Request


def request(ttft: float, gaps: tuple[float, ...] = ()) -> Request:
    return Request(input_tokens=9, output_tokens=len(gaps) + 1, ttft=ttft, latency=ttft + sum(gaps), gaps=gaps)


def test_a_draw_has_the_percentiles_of_what_was_drawn() -> None:
    random = numpy.random.default_rng(0)
    by_request = [random.random(length).tolist() for length in (5, 1, 0, 7, 2)]
    counts = numpy.array([0, 3, 2, 1, 2])
    drawn = [value for values, times in zip(by_request, counts, strict=True) for value in values * int(times)]
    assert _Pool(by_request).percentiles(counts[None])[0] == pytest.approx(numpy.percentile(drawn, PERCENTILES))


def test_a_draw_of_requests_without_a_value_is_no_number() -> None:
    assert numpy.isnan(_Pool([[], [1.0]]).percentiles(numpy.array([[2, 0]]))).all()


def test_every_metric_is_of_its_own_times() -> None:
    pairs = [(request(0.2, (0.01, 0.03)), request(0.1, (0.02, 0.02)))] * 3
    medians = {one.metric: (one.dense, one.sparse) for one in compare(pairs, 0) if one.percentile == 50}
    assert medians == {
        "ttft": pytest.approx((200, 100)),
        "itl": pytest.approx((20, 20)),
        "tpot": pytest.approx((20, 20)),
        "e2e": pytest.approx((240, 140)),
    }
    assert set(medians) == set(METRICS)


def test_answers_of_one_token_have_nothing_between_tokens() -> None:
    assert {one.metric for one in compare([(request(0.2), request(0.1))], 0)} == {"ttft", "e2e"}


def test_one_request_has_no_interval() -> None:
    assert {(one.low, one.high) for one in compare([(request(0.2), request(0.1))], 0)} == {(None, None)}


def test_draws_that_are_looked_at_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(request(number, (1.0, number)), request(number + 1, (2.0,))) for number in range(1, 9)]
    whole = compare(pairs, 0)
    monkeypatch.setattr(module, "MOST_AT_ONCE", 50)
    assert compare(pairs, 0) == whole


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Both servers have the same distribution, so the true speed-up is 1."""
    random = numpy.random.default_rng(1)
    held = 0
    for seed in range(40):
        times = random.lognormal(size=(60, 2))
        median = compare([(request(a), request(b)) for a, b in times], seed)[0]
        assert median.low < median.speedup < median.high
        held += median.low <= 1 <= median.high
    assert held >= 34  # 38 are expected of 40; fewer than 34 come once in a hundred times


def test_what_slows_both_servers_widens_no_interval() -> None:
    times = numpy.random.default_rng(2).lognormal(sigma=2, size=50)
    median = compare([(request(2 * time), request(time)) for time in times], 0)[0]
    assert (median.low, median.speedup, median.high) == pytest.approx((2, 2, 2))
