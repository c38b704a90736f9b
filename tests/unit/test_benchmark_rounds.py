# SPDX-License-Identifier: Apache-2.0
"""A speed-up is judged by rounds, and noise is not taken for a difference, nor a difference for noise."""

import itertools
import math
import random
import statistics
from collections.abc import Callable

import pytest

from benchmarks import DENSE, SPARSE, interval
from benchmarks.rounds import FEWEST_JUDGED, MOST_AT_ONCE, NO_LIMITS, Limits, Rounds, judge

LIMITS = Limits()
CELLS = 200


def noisy(
    seed: int, noise: float, slower: float = 1.0, drift: float = 0.0, second: float = 1.0
) -> Callable[[str], float]:
    """Engines of which sparse is so much slower, on a machine whose noise is heavy-tailed.

    Args:
        drift: by how much the machine slows down from one answer to the next.
        second: by how much an answer after another engine's takes longer.
    """
    lots, answers, before = random.Random(seed), itertools.count(), [SPARSE]  # who warmed up last

    def ask(kind: str) -> float:
        wave = lots.gauss(0, noise) * (3 if lots.random() < 0.1 else 1)
        switch = second if kind != before[0] else 1.0
        before[0] = kind
        return math.exp(wave) * (1 + drift * next(answers)) * switch * (slower if kind == SPARSE else 1.0)

    return ask


def timed(ask: Callable[[str], float], rounds: int) -> Rounds:
    found = Rounds()
    for _ in range(rounds):
        found.time(ask, 0.0)
    return found


def verdict(found: Rounds) -> str:
    return judge(found.speedup, *(found.interval or (None, None)), LIMITS)


def until_settled(ask: Callable[[str], float]) -> Rounds:
    found = Rounds()
    found.time_until_settled(ask, 0.0, 0.0, LIMITS)
    return found


def test_the_interval_of_a_median_holds_it_so_often() -> None:
    lots = random.Random(0)
    for number in (6, 9, 30):
        ends = [interval.of_median([lots.expovariate(1.0) for _ in range(number)]) for _ in range(2000)]
        held = statistics.fmean(low < math.log(2) < high for low, high in filter(None, ends))
        assert 0.945 < held < 0.985
    assert interval.of_median(range(interval.FEWEST_OF_MEDIAN - 1)) is None
    assert interval.of_median([3, 1, 2, 5, 4, 6]) == (1, 6)
    assert interval.of_median(range(9)) == (1, 7)


def test_neither_order_nor_drift_favours_an_engine() -> None:
    found = timed(noisy(0, noise=0.0, drift=0.01, second=1.3), 7)
    assert found.ratios == pytest.approx([1.0] * 7, abs=0.08)
    assert found.speedup == pytest.approx(1.0, abs=0.005)
    assert len(found.seconds[DENSE]) == len(found.seconds[SPARSE]) == 14


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.1])
def test_equal_engines_are_not_called_slower_for_noise(noise: float) -> None:
    verdicts = [verdict(until_settled(noisy(seed, noise))) for seed in range(CELLS)]
    assert sum("below" in said for said in verdicts) <= 0.025 * CELLS


def test_in_little_noise_equal_engines_pass() -> None:
    assert not any(verdict(until_settled(noisy(seed, noise=0.01))) for seed in range(CELLS))


def test_a_slower_engine_is_found_out() -> None:
    verdicts = [verdict(until_settled(noisy(seed, noise=0.01, slower=1.06))) for seed in range(CELLS)]
    assert statistics.fmean("below 0.98" in said for said in verdicts) > 0.9  # by the fewest rounds
    verdicts = [verdict(timed(noisy(seed, noise=0.01, slower=1.06), 12)) for seed in range(CELLS)]
    assert statistics.fmean("below 0.98" in said for said in verdicts) > 0.99
    assert all(verdict(timed(noisy(seed, noise=0.05, slower=1.08), 60)) for seed in range(20))


def test_in_much_noise_nothing_is_known() -> None:
    said = verdict(timed(noisy(0, noise=0.4), 10))
    assert said.startswith("it is not known whether it is slower: 0.") and said.endswith("on a quiet machine")


def test_rounds_are_added_only_in_doubt() -> None:
    assert len(until_settled(noisy(0, noise=0.0)).ratios) == 1
    assert len(until_settled(noisy(0, noise=0.0, slower=1.1)).ratios) == FEWEST_JUDGED
    smoke = Rounds()
    smoke.time_until_settled(noisy(0, noise=0.0, slower=9.0), 0.0, 0.0, NO_LIMITS)
    assert len(smoke.ratios) == 1 and judge(smoke.speedup, 0.1, 0.2, NO_LIMITS) == ""


def test_doubt_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("benchmarks.rounds.time.monotonic", lambda: float(next(clock)))
    found = Rounds()
    found.time_until_settled(noisy(0, noise=0.0, slower=1.1), 10.0, 100.0, LIMITS)
    assert FEWEST_JUDGED < len(found.ratios) < 110
    found.time(noisy(0, noise=0.0), 1e9)
    assert len(found.ratios) < 110 + MOST_AT_ONCE
