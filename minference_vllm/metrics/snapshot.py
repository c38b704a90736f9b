# SPDX-License-Identifier: Apache-2.0
"""The totals that a worker counts and publishes."""

import json
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, fields
from typing import Any, TypeVar

from minference_vllm.recall import Recall

Counts = Counter[tuple[str, str]]
"""Counts by a pair of words, such as path and reason."""
COUNTS = ("tokens", "chunks", "requests", "engines")
NUMBERS = ("kept_pairs", "causal_pairs", "scratch_bytes", "faults", "broken_ranks")


Counted = TypeVar("Counted", "Times", "Snapshot")


def field_by_field(operation: Callable[[Any, Any], Any], one: Counted, other: Counted) -> Counted:
    """An object whose fields are the results of an operation on the fields of two objects of its type."""
    return type(one)(*(operation(getattr(one, each.name), getattr(other, each.name)) for each in fields(one)))


@dataclass(frozen=True, slots=True)
class Times:
    """Times of laps; a lap is one layer's attention of one chunk.

    Attributes:
        laps: how many laps were timed.
        choose: seconds that choosing keys took in them.
        attend: seconds that the rest took: attending, and the guard.
    """

    laps: int = 0
    choose: float = 0.0
    attend: float = 0.0

    def __add__(self, other: "Times") -> "Times":
        return field_by_field(operator.add, self, other)

    def __sub__(self, other: "Times") -> "Times":
        return field_by_field(operator.sub, self, other)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Totals since start, or the difference between two such totals.

    Attributes:
        tokens, chunks, requests: of prompts, by path and reason.
        kept_pairs, causal_pairs: of all sparse attention.
        recall: of all sparse attention.
        scratch_bytes: bytes of scratch that were claimed.
        engines: number of engines by method and kernel.
        times: of the layers of chunks that were timed.
        faults: number of exceptions on all ranks.
        broken_ranks: number of ranks that have given the sparse path up.
    """

    tokens: Counts = field(default_factory=Counter)
    chunks: Counts = field(default_factory=Counter)
    kept_pairs: int = 0
    causal_pairs: int = 0
    recall: Recall = field(default_factory=Recall)
    scratch_bytes: int = 0
    engines: Counts = field(default_factory=Counter)
    times: Times = field(default_factory=Times)
    faults: int = 0
    broken_ranks: int = 0
    requests: Counts = field(default_factory=Counter)

    @property
    def density(self) -> float | None:
        """Kept / causal pairs, above 1 if the guard had most heads attend again; None before the first read-back."""
        return self.kept_pairs / self.causal_pairs if self.causal_pairs else None

    def __add__(self, other: "Snapshot") -> "Snapshot":
        return field_by_field(operator.add, self, other)

    def __sub__(self, other: "Snapshot") -> "Snapshot":
        return field_by_field(operator.sub, self, other)

    def to_json(self) -> str:
        counts = {name: list(getattr(self, name).items()) for name in COUNTS}
        numbers = {name: getattr(self, name) for name in NUMBERS}
        return json.dumps({**counts, **numbers, "recall": self.recall.to_json(), "times": astuple(self.times)})

    @classmethod
    def from_json(cls, text: str) -> "Snapshot":
        totals = json.loads(text)
        counts: dict[str, Any] = {
            name: Counter({tuple(labels): count for labels, count in totals.pop(name)}) for name in COUNTS
        }
        recall, times = Recall.from_json(totals.pop("recall")), Times(*totals.pop("times"))
        return cls(**counts, **totals, recall=recall, times=times)

    def summary(self, seconds: float) -> str:
        """The log line for what was counted in this many seconds."""
        dense = Counter({reason: tokens for (path, reason), tokens in self.tokens.items() if path == "dense"})
        reasons = ", ".join(f"{reason} {tokens:,}" for reason, tokens in dense.most_common())
        density = "density not read yet" if self.density is None else f"density {self.density:.1%}"
        return (
            f"MInference: {self.tokens.total() - dense.total():,} prompt tokens sparse, {dense.total():,} dense"
            f"{f' ({reasons})' if reasons else ''} in {seconds:.0f} s; {density}{self._guarded()}"
        )

    def _guarded(self) -> str:
        recall = self.recall
        return f"; {recall.redone:,} of {recall.measured:,} heads again dense" if recall.redone else ""
