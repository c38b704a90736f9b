# SPDX-License-Identifier: Apache-2.0
"""A speed-up is judged by rounds, and noise is not taken for a difference, nor a difference for noise."""

import itertools
import math
import random
import statistics
from collections.abc import Callable

import pytest

from benchmarks import DENSE, SPARSE, interval
from benchmarks.rounds import EXTENSION, FEWEST_JUDGED, NO_LIMITS, OF_LONG, Limits, Rounds, judge

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


def of(ask: Callable[[str], float], rounds: int) -> Rounds:
    found = Rounds()
    found.add(ask, rounds)
    return found


def verdict(found: Rounds) -> str:
    return judge(found.speedup, *(found.interval or (None, None)), LIMITS)


def timed(ask: Callable[[str], float], most_seconds: float = 1e9, limits: Limits = LIMITS) -> Rounds:
    found = Rounds()
    found.time(ask, most_seconds, limits)
    return found


def share_below(noise: float, slower: float) -> float:
    """Of cells, that are called slower."""
    return statistics.fmean("below 0.98" in verdict(timed(noisy(seed, noise, slower))) for seed in range(CELLS))


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
    found = of(noisy(0, noise=0.0, drift=0.01, second=1.3), 7)
    assert found.ratios == pytest.approx([1.0] * 7, abs=0.08)
    assert found.speedup == pytest.approx(1.0, abs=0.005)
    assert len(found.seconds[DENSE]) == len(found.seconds[SPARSE]) == 14


@pytest.mark.parametrize("noise", [0.01, 0.02, 0.05, 0.1])
def test_equal_engines_are_not_called_slower_for_noise(noise: float) -> None:
    assert share_below(noise, slower=1.0) <= 0.025


def test_in_little_noise_equal_engines_pass() -> None:
    assert not any(verdict(timed(noisy(seed, noise=0.01))) for seed in range(CELLS))


@pytest.mark.parametrize(
    ("noise", "slower", "chance"),
    [(0.02, 1.05, 0.94), (0.02, 1.03, 0.2), (0.01, 1.05, 1.0), (0.01, 1.03, 0.67), (0.005, 1.03, 1.0)],
)
def test_a_slower_engine_is_found_out_with_the_chance_that_is_said(noise: float, slower: float, chance: float) -> None:
    assert share_below(noise, slower) == pytest.approx(chance, abs=0.1)


def test_in_much_noise_nothing_is_known() -> None:
    said = verdict(of(noisy(0, noise=0.4), 10))
    assert said.startswith("it is not known whether it is slower: 0.") and said.endswith("on a quiet machine")


def test_rounds_are_added_once_and_only_in_doubt() -> None:
    assert len(timed(noisy(0, noise=0.0)).ratios) == FEWEST_JUDGED
    for slower in (1.03, 1.1):  # whether it then passes or not
        assert len(timed(noisy(0, noise=0.01, slower=slower)).ratios) == FEWEST_JUDGED + EXTENSION
    one_round = iter([1.0, 1.0, 1.0, 1.1])  # SPARSE, DENSE, DENSE, SPARSE
    one_slow_round = timed(lambda kind: next(one_round, 1.0))
    assert len(one_slow_round.ratios) == FEWEST_JUDGED + EXTENSION and not verdict(one_slow_round)


def test_a_long_cell_is_not_judged_unless_it_looks_slow() -> None:
    round_s = 4.0  # four answers of a second each
    assert len(timed(noisy(0, noise=0.0), FEWEST_JUDGED * round_s).ratios) == FEWEST_JUDGED
    equal = timed(noisy(0, noise=0.0), FEWEST_JUDGED * round_s - 1)
    assert (len(equal.ratios), equal.interval, verdict(equal)) == (OF_LONG, None, "")
    slow = timed(noisy(0, noise=0.0, slower=1.03), 1.0)
    assert len(slow.ratios) == OF_LONG + EXTENSION and "below 0.98" in verdict(slow)


def test_an_answer_that_stalls_does_not_make_a_cell_long() -> None:
    first = iter([100.0])
    assert len(timed(lambda kind: next(first, 1.0), 60.0).ratios) >= FEWEST_JUDGED


def test_nothing_is_wrong_with_the_times_of_a_smoke_test() -> None:
    smoke = timed(noisy(0, noise=0.0, slower=9.0), 0.1, NO_LIMITS)
    assert len(smoke.ratios) == OF_LONG and judge(smoke.speedup, 0.1, 0.2, NO_LIMITS) == ""
