# SPDX-License-Identifier: Apache-2.0
"""The recall of held-out rows: the attention that rows which did not choose the kept keys have on them."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

RECALL_EDGES = (0.25, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
"""Upper edges of the histogram's buckets but the last, which ends at 1."""

NUM_BUCKETS = len(RECALL_EDGES) + 1

LOST_ROWS = 2
"""Held-out rows that must be lost before the guard acts: of 64 one may be an exception."""


class Floors(NamedTuple):
    """When a head's kept keys are too few. Shares of attention; 0 is no floor.

    Attributes:
        head: its recall in a chunk, the mean over held-out rows, is below this;
        row: or LOST_ROWS of these rows have less than this.
    """

    head: float
    row: float


@dataclass(frozen=True, slots=True)
class HeadRecall:
    """Of one head in one layer: chunks measured, the sum of their recalls, the smallest of them."""

    chunks: int
    total: float
    worst: float

    def __add__(self, other: "HeadRecall") -> "HeadRecall":
        return HeadRecall(self.chunks + other.chunks, self.total + other.total, min(self.worst, other.worst))

    def __sub__(self, other: "HeadRecall") -> "HeadRecall":
        """What came after `other`; of the smallest only the one since start is known."""
        return HeadRecall(self.chunks - other.chunks, self.total - other.total, self.worst)


@dataclass(frozen=True, slots=True)
class Recall:
    """Of all layers, since start or between two readings.

    Attributes:
        histogram: [NUM_BUCKETS] heads of chunks by recall, see RECALL_EDGES.
        redone: heads of chunks that were attended to again.
        heads: by layer and head, of this worker's rank.
    """

    histogram: tuple[int, ...] = (0,) * NUM_BUCKETS
    redone: int = 0
    heads: dict[tuple[int, int], HeadRecall] = field(default_factory=dict)

    def __add__(self, other: "Recall") -> "Recall":
        heads = dict(self.heads)
        for key, head in other.heads.items():
            heads[key] = heads[key] + head if key in heads else head
        return Recall(self._buckets(other, 1), self.redone + other.redone, heads)

    def __sub__(self, other: "Recall") -> "Recall":
        later = {key: head - other.heads[key] if key in other.heads else head for key, head in self.heads.items()}
        heads = {key: head for key, head in later.items() if head.chunks}
        return Recall(self._buckets(other, -1), self.redone - other.redone, heads)

    def _buckets(self, other: "Recall", sign: int) -> tuple[int, ...]:
        return tuple(a + sign * b for a, b in zip(self.histogram, other.histogram, strict=True))

    @property
    def measured(self) -> int:
        """Heads of chunks."""
        return sum(self.histogram)

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        heads = [(*key, head.chunks, head.total, head.worst) for key, head in self.heads.items()]
        return {"histogram": self.histogram, "redone": self.redone, "heads": heads}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Recall":
        heads = {(layer, head): HeadRecall(*rest) for layer, head, *rest in value["heads"]}
        return cls(tuple(value["histogram"]), value["redone"], heads)

    def cumulative(self) -> Iterator[tuple[str, int]]:
        """Upper edge of each bucket, and the heads of chunks whose recall is at most that."""
        return zip((*map(str, RECALL_EDGES), "1.0"), itertools.accumulate(self.histogram), strict=True)
