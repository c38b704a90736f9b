# SPDX-License-Identifier: Apache-2.0
"""Rounds in which two engines do the same: how much faster the sparse one is, and how sure that is under noise."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

from benchmarks import DENSE, SPARSE, interval

ORDER = (SPARSE, DENSE, DENSE, SPARSE)
"""Of one round: the clock depends on what ran before, and what drifts evenly drops out of the round's ratio."""

MOST_AT_ONCE = 30
FEWEST_JUDGED = interval.FEWEST_OF_MEDIAN
"""Rounds of a cell about whose speed there is doubt."""


class Limits(NamedTuple):
    """What speed-ups, dense's seconds / sparse's, are held to.

    Attributes:
        least: a lower one is too slow.
        shown: an interval that reaches below this shows nothing.
    """

    least: float = 0.98
    shown: float = 0.90


NO_LIMITS = Limits(0.0, 0.0)
"""Of a smoke test, whose times mean nothing."""


class Rounds:
    """Times of one piece of work.

    Attributes:
        seconds: of each time that it was done, by engine.
        ratios: dense's seconds / sparse's, of each round.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {DENSE: [], SPARSE: []}
        self.ratios: list[float] = []

    def time(self, ask: Callable[[str], float], seconds: float) -> None:
        """Add rounds until so many seconds are over; at least one, and not for ever.

        Args:
            ask: has the engine of a kind do the work, and gives the seconds that it took.
        """
        begin = time.monotonic()
        for _ in range(MOST_AT_ONCE):
            total = {DENSE: 0.0, SPARSE: 0.0}
            for kind in ORDER:
                self.seconds[kind].append(ask(kind))
                total[kind] += self.seconds[kind][-1]
            self.ratios.append(total[DENSE] / total[SPARSE])
            if time.monotonic() - begin >= seconds:
                return

    def time_until_settled(
        self, ask: Callable[[str], float], seconds: float, most_seconds: float, limits: Limits
    ) -> None:
        """Add rounds of so many seconds; in doubt again and again, until those in doubt are over.

        One that hovers about a limit may so come to keep it; one that is slower by more than noise does not.

        Args:
            most_seconds: for all; FEWEST_JUDGED rounds are made in any case.
        """
        begin = time.monotonic()
        self.time(ask, seconds)
        while not self.is_settled(limits) and (
            len(self.ratios) < FEWEST_JUDGED or time.monotonic() - begin < most_seconds
        ):
            self.time(ask, seconds)

    @property
    def speedup(self) -> float:
        """The rounds' median."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of 95%, for the speed-up; None of few rounds."""
        return interval.of_median(self.ratios)

    def is_settled(self, limits: Limits) -> bool:
        """Whether the speed-up keeps the limits: by every round, where these are too few for an interval."""
        ends = self.interval
        if ends is None:
            return min(self.ratios) >= limits.least
        return self.speedup >= limits.least and ends[0] >= limits.shown


def judge(speedup: float, low: float | None, high: float | None, limits: Limits) -> str:
    """What is wrong with a speed-up and its interval; empty if nothing is."""
    if low is None or high is None:
        return "" if speedup >= limits.least else f"{speedup:.3f} times as fast as dense in too few rounds to judge"
    ends = f"{low:.3f} to {high:.3f}"
    if high < limits.least:
        return f"{speedup:.3f} times as fast as dense ({ends}), below {limits.least}"
    if low < limits.shown:
        return (
            f"it is not known whether it is slower: {ends} times as fast as dense. Measure it again on a quiet machine"
        )
    return ""
