# SPDX-License-Identifier: Apache-2.0
"""Recall: the share of the attention of held-out rows, which had no part in choosing, that lies on the kept keys."""

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

RECALL_EDGES = (0.25, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
"""Upper edges of the histogram's buckets, except that of the last, which ends at 1."""

NUM_BUCKETS = len(RECALL_EDGES) + 1

ROWS_PER_PART = 8192
"""Most rows in a part of a chunk. HELD_OUT_ROWS rows of each part are held out, which is one for every tile of the
largest part. So a passage of two tiles that loses its keys contains two held-out rows, enough for the guard to act."""

LOST_ROWS = 2
"""How many held-out rows of a chunk must be below the floor for rows before the guard acts: a single one may be an
exception. In chunks of fewer than 256 rows some held-out rows are the same row, so one row below the floor may count as
two."""


def parts_of(num_rows: int) -> list[range]:
    """Divide a chunk's rows into equal parts, as few as possible, of at most ROWS_PER_PART rows each."""
    if num_rows == 0:
        return []
    count = -(-num_rows // ROWS_PER_PART)
    bounds = [num_rows * number // count for number in range(count + 1)]
    return [range(begin, end) for begin, end in itertools.pairwise(bounds)]


class Floors(NamedTuple):
    """The bounds of recall below which a head has kept too few keys in a chunk. Shares of attention; 0: no floor.

    Attributes:
        head: bound of the head's recall in the chunk, which is the mean over its held-out rows.
        row: bound of the recall of a single held-out row; LOST_ROWS rows below it are too many.
    """

    head: float
    row: float


@dataclass(frozen=True, slots=True)
class LayerRecall:
    """The recall of one layer: the number of chunks measured and, by head, the sum and the smallest of its recalls."""

    chunks: int
    totals: tuple[float, ...]
    worst: tuple[float, ...]

    def __add__(self, other: "LayerRecall") -> "LayerRecall":
        totals = tuple(map(sum, itertools.zip_longest(self.totals, other.totals, fillvalue=0.0)))
        worst = tuple(map(min, itertools.zip_longest(self.worst, other.worst, fillvalue=1.0)))
        return LayerRecall(self.chunks + other.chunks, totals, worst)

    def __sub__(self, other: "LayerRecall") -> "LayerRecall":
        """What was measured after `other`; only `worst` covers all chunks since the start: no other is known."""
        totals = tuple(map(operator.sub, self.totals, other.totals))
        return LayerRecall(self.chunks - other.chunks, totals, self.worst)


@dataclass(frozen=True, slots=True)
class Recall:
    """The recall of all layers, since the start or between two readings.

    Attributes:
        histogram: [NUM_BUCKETS] number of recalls in each bucket, see RECALL_EDGES; each head of each chunk has one
            recall.
        redone: how many times a head attended again to a chunk, to all keys.
        layers: by the layer's number, see LayerState (in a RecallMeter by its position). Heads are those of this rank.
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
        """How many recalls were measured: one for each head of each chunk."""
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
        """Upper edge of each bucket, as Prometheus writes it, and how many recalls are at most that."""
        return zip((*map(str, RECALL_EDGES), "+Inf"), itertools.accumulate(self.histogram), strict=True)

    def heads(self) -> Iterator[tuple[str, str, float, float]]:
        """Layer, head, mean and smallest recall of each head."""
        for position, layer in self.layers.items():
            for head, (total, worst) in enumerate(zip(layer.totals, layer.worst, strict=True)):
                yield str(position), str(head), total / layer.chunks, worst
