# SPDX-License-Identifier: Apache-2.0
"""Rounds in which two engines do the same work: how much faster the sparse one is, and how sure that is."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

from benchmarks import DENSE, SPARSE, interval

ORDER = (SPARSE, DENSE, DENSE, SPARSE)
"""The order within a round: the clock depends on what ran before, and steady drift drops out of a round's ratio."""

FEWEST_JUDGED = interval.FEWEST_OF_MEDIAN
"""Rounds of a cell. With fewer there is no interval, so the cell is not judged."""
OF_LONG = 3
"""Rounds of a cell for which FEWEST_JUDGED rounds would take too long."""
EXTENSION = 12
"""Further rounds, made once, of a cell that is in doubt. If the time of an answer has 2% of noise, an engine that is 5%
slower fails in nine of ten cells, and one that is 3% slower in one of five. With 1% of noise they fail in all cells,
and in two of three. An engine that is as fast as dense fails in fewer than one of forty."""


class Limits(NamedTuple):
    """The limits for speed-ups, dense's seconds / sparse's.

    Attributes:
        least: a lower speed-up is too slow. A cell is in doubt if its first rounds may mean such a speed-up.
        shown: an interval that reaches below this is too wide to show anything.
    """

    least: float = 0.98
    shown: float = 0.90


ROUNDS = (
    f"{FEWEST_JUDGED} of a cell, {OF_LONG} where those would take too long; {EXTENSION} more, once, where the interval "
    f"(of {OF_LONG} rounds, the speed-up) reaches below the least that is allowed. judged: whether there is an "
    f"interval, that is at least {FEWEST_JUDGED} rounds; what is not judged does not fail"
)
"""The rule for the number of rounds, for the record."""

NO_LIMITS = Limits(0.0, 0.0)
"""For a smoke test, whose times mean nothing."""


class Rounds:
    """The times of one piece of work.

    Attributes:
        seconds: by engine, for each time that the work was done.
        ratios: dense's seconds / sparse's, for each round.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {DENSE: [], SPARSE: []}
        self.ratios: list[float] = []

    def add(self, ask: Callable[[str], float], rounds: int) -> None:
        """Add rounds.

        Args:
            ask: has the engine of a kind do the work, and returns the seconds that it took.
        """
        for _ in range(rounds):
            total = {DENSE: 0.0, SPARSE: 0.0}
            for kind in ORDER:
                self.seconds[kind].append(ask(kind))
                total[kind] += self.seconds[kind][-1]
            self.ratios.append(total[DENSE] / total[SPARSE])

    def time(self, ask: Callable[[str], float], most_seconds: float, limits: Limits) -> None:
        """Add FEWEST_JUDGED rounds, and EXTENSION more if these leave a doubt.

        Apart from this one extension, the number of rounds must not depend on their ratios: adding rounds until a cell
            passes would let every cell pass in the end.

        Args:
            ask: see add.
            most_seconds: only OF_LONG rounds are made if, judging by these, FEWEST_JUDGED would take longer.
        """
        self.add(ask, OF_LONG)
        usual = statistics.median(self.seconds[DENSE] + self.seconds[SPARSE])  # a single answer may stall
        if FEWEST_JUDGED * len(ORDER) * usual <= most_seconds:
            self.add(ask, FEWEST_JUDGED - OF_LONG)
        if self.is_in_doubt(limits):
            self.add(ask, EXTENSION)

    @property
    def speedup(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the speed-up; None if there are too few rounds."""
        return interval.of_median(self.ratios)

    def is_in_doubt(self, limits: Limits) -> bool:
        """Whether the speed-up may be too low, by the interval's lower end, or by itself if there is no interval."""
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
