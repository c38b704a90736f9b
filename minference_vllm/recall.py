# SPDX-License-Identifier: Apache-2.0
"""The recall of held-out rows: the attention that rows which did not choose the kept keys have on them."""

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

RECALL_EDGES = (0.25, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
"""Upper edges of the histogram's buckets but the last, which ends at 1."""

NUM_BUCKETS = len(RECALL_EDGES) + 1

ROWS_PER_PART = 8192
"""Rows of a chunk, at the most, of which HELD_OUT_ROWS are held out: a row a tile. So in a passage of two tiles that
lost its keys there are two of them, enough for the guard to act."""

LOST_ROWS = 2
"""Held-out rows of a chunk that must be lost before the guard acts: one may be an exception. In chunks of fewer than
256 rows some held-out rows are the same row, so one that is lost may count as two."""


def parts_of(num_rows: int) -> list[range]:
    """Equal parts of a chunk's rows, as few as hold ROWS_PER_PART each. Each has its HELD_OUT_ROWS."""
    if num_rows == 0:
        return []
    count = -(-num_rows // ROWS_PER_PART)
    bounds = [num_rows * number // count for number in range(count + 1)]
    return [range(begin, end) for begin, end in itertools.pairwise(bounds)]


class Floors(NamedTuple):
    """When a head's kept keys are too few. Shares of attention; 0 is no floor.

    Attributes:
        head: its recall in a chunk, the mean over held-out rows, is below this;
        row: or LOST_ROWS of these rows have less than this.
    """

    head: float
    row: float


@dataclass(frozen=True, slots=True)
class LayerRecall:
    """Of one layer: chunks measured, and by head the sum of their recalls and the smallest of them."""

    chunks: int
    totals: tuple[float, ...]
    worst: tuple[float, ...]

    def __add__(self, other: "LayerRecall") -> "LayerRecall":
        totals = tuple(map(sum, itertools.zip_longest(self.totals, other.totals, fillvalue=0.0)))
        worst = tuple(map(min, itertools.zip_longest(self.worst, other.worst, fillvalue=1.0)))
        return LayerRecall(self.chunks + other.chunks, totals, worst)

    def __sub__(self, other: "LayerRecall") -> "LayerRecall":
        """What came after `other`; of the smallest only those since start are known."""
        totals = tuple(map(operator.sub, self.totals, other.totals))
        return LayerRecall(self.chunks - other.chunks, totals, self.worst)


@dataclass(frozen=True, slots=True)
class Recall:
    """Of all layers, since start or between two readings.

    Attributes:
        histogram: [NUM_BUCKETS] heads of chunks by recall, see RECALL_EDGES.
        redone: heads of chunks that were attended to again.
        layers: by number, see LayerState; a RecallMeter's are by position. Heads are this rank's.
    """

    histogram: tuple[int, ...] = (0,) * NUM_BUCKETS
    redone: int = 0
    layers: dict[int, LayerRecall] = field(default_factory=dict)

    def __add__(self, other: "Recall") -> "Recall":
        layers = dict(self.layers)
        for position, layer in other.layers.items():
            layers[position] = layers[position] + layer if position in layers else layer
        histogram = tuple(map(operator.add, self.histogram, other.histogram))
        return Recall(histogram, self.redone + other.redone, layers)

    def __sub__(self, other: "Recall") -> "Recall":
        later = {at: layer - other.layers[at] if at in other.layers else layer for at, layer in self.layers.items()}
        layers = {position: layer for position, layer in later.items() if layer.chunks}
        histogram = tuple(map(operator.sub, self.histogram, other.histogram))
        return Recall(histogram, self.redone - other.redone, layers)

    @property
    def measured(self) -> int:
        """Heads of chunks."""
        return sum(self.histogram)

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        layers = {at: (layer.chunks, layer.totals, layer.worst) for at, layer in self.layers.items()}
        return {"histogram": self.histogram, "redone": self.redone, "layers": layers}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Recall":
        layers = {
            int(at): LayerRecall(chunks, tuple(totals), tuple(worst))
            for at, (chunks, totals, worst) in value["layers"].items()
        }
        return cls(tuple(value["histogram"]), value["redone"], layers)

    def cumulative(self) -> Iterator[tuple[str, int]]:
        """Upper edge of each bucket, as Prometheus writes it, and the heads of chunks whose recall is at most that."""
        return zip((*map(str, RECALL_EDGES), "+Inf"), itertools.accumulate(self.histogram), strict=True)

    def heads(self) -> Iterator[tuple[str, str, float, float]]:
        """Layer, head, mean and smallest recall of each head."""
        for position, layer in self.layers.items():
            for head, (total, worst) in enumerate(zip(layer.totals, layer.worst, strict=True)):
                yield str(position), str(head), total / layer.chunks, worst
