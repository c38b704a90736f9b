# SPDX-License-Identifier: Apache-2.0
"""Quantiles of times that are kept as counts, so that those of several runs can be added."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

STEP = 1.002
"""Each bucket is wider than the one before by this factor, so quantiles are exact to a tenth of a per cent."""

SHORTEST_S = 1e-6


@dataclass(frozen=True, slots=True)
class Latencies:
    """Times by logarithmic buckets."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, seconds: float) -> None:
        self.counts[round(math.log(max(seconds, SHORTEST_S) / SHORTEST_S, STEP))] += 1

    def extend(self, times: Iterable[float]) -> None:
        for seconds in times:
            self.add(seconds)

    @property
    def total(self) -> int:
        return self.counts.total()

    def quantile(self, share: float) -> float | None:
        """The smallest time in seconds that this share of all times does not exceed; None if there are none."""
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= share * self.total:
                return SHORTEST_S * STEP**bucket
        return None

    def __add__(self, other: "Latencies") -> "Latencies":
        return Latencies(self.counts + other.counts)

    def to_json(self) -> list[tuple[int, int]]:
        return [(bucket, self.counts[bucket]) for bucket in sorted(self.counts)]

    @classmethod
    def from_json(cls, pairs: list[tuple[int, int]]) -> "Latencies":
        return cls(Counter(dict(pairs)))
