# SPDX-License-Identifier: Apache-2.0
"""Rounds in which two engines do the same: how much faster the sparse one is, and how sure that is under noise."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

from benchmarks import DENSE, SPARSE, interval

ORDER = (SPARSE, DENSE, DENSE, SPARSE)
"""Of one round: the clock depends on what ran before, and what drifts evenly drops out of the round's ratio."""

FEWEST_JUDGED = interval.FEWEST_OF_MEDIAN
"""Rounds of a cell: of fewer there is no interval, and it is not judged."""
OF_LONG = 3
"""Rounds of a cell of which so many as are judged would take too long."""
EXTENSION = 12
"""Further rounds of a cell in doubt, once. Where an answer's time has 2% of noise, an engine that is 5% slower fails in
nine cells of ten, one that is 3% slower in one of five; where it has 1%, in all, and in two of three. One that is as
fast as dense fails in fewer than one of forty."""


class Limits(NamedTuple):
    """What speed-ups, dense's seconds / sparse's, are held to.

    Attributes:
        least: a lower one is too slow; there is doubt about a cell of which the first rounds may show such a one.
        shown: an interval that reaches below this shows nothing.
    """

    least: float = 0.98
    shown: float = 0.90


ROUNDS = (
    f"{FEWEST_JUDGED} of a cell, {OF_LONG} where those would take too long; {EXTENSION} more, once, where the interval "
    f"(of {OF_LONG} rounds, the speed-up) reaches below the least that is allowed. judged: whether there is an "
    f"interval, that is at least {FEWEST_JUDGED} rounds; what is not judged does not fail"
)
"""For the record: how many there are."""

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

    def add(self, ask: Callable[[str], float], rounds: int) -> None:
        """Add so many rounds.

        Args:
            ask: has the engine of a kind do the work, and gives the seconds that it took.
        """
        for _ in range(rounds):
            total = {DENSE: 0.0, SPARSE: 0.0}
            for kind in ORDER:
                self.seconds[kind].append(ask(kind))
                total[kind] += self.seconds[kind][-1]
            self.ratios.append(total[DENSE] / total[SPARSE])

    def time(self, ask: Callable[[str], float], most_seconds: float, limits: Limits) -> None:
        """Add FEWEST_JUDGED rounds, and EXTENSION more if these leave a doubt.

        How many there are must not depend on their ratios but for that once: who adds rounds until a cell passes has
        every cell pass in the end.

        Args:
            ask: see add.
            most_seconds: no more than OF_LONG are made where, by these, FEWEST_JUDGED would take longer.
        """
        self.add(ask, OF_LONG)
        usual = statistics.median(self.seconds[DENSE] + self.seconds[SPARSE])  # one that stalled says nothing
        if FEWEST_JUDGED * len(ORDER) * usual <= most_seconds:
            self.add(ask, FEWEST_JUDGED - OF_LONG)
        if self.is_in_doubt(limits):
            self.add(ask, EXTENSION)

    @property
    def speedup(self) -> float:
        """The rounds' median."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of 95%, for the speed-up; None of few rounds."""
        return interval.of_median(self.ratios)

    def is_in_doubt(self, limits: Limits) -> bool:
        """Whether the speed-up may be too low: by its interval's lower end, by itself where there is none."""
        low = self.interval[0] if self.interval else self.speedup
        return low < limits.least


def judge(speedup: float, low: float | None, high: float | None, limits: Limits) -> str:
    """What is wrong with a speed-up and its interval; empty if nothing is, or if there is no interval to judge by."""
    if low is None or high is None:
        return ""
    ends = f"{low:.3f} to {high:.3f}"
    if high < limits.least:
        return f"{speedup:.3f} times as fast as dense ({ends}), below {limits.least}"
    if low < limits.shown:
        return (
            f"it is not known whether it is slower: {ends} times as fast as dense. Measure it again on a quiet machine"
        )
    return ""
