# SPDX-License-Identifier: Apache-2.0
"""The findings about one server under traffic, or about several stretches of it together."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.soak.client import Sent
from benchmarks.soak.growth import Growth
from benchmarks.soak.latencies import Latencies
from benchmarks.soak.schedule import Fate

COUNTS = (
    "answered_short", "answered_long", "cancelled", "dropped", "refused", "errors", "restarts", "left_requests",
    "preemptions", "sparse_tokens", "kept_pairs", "causal_pairs",
)  # fmt: skip
TIMES = ("itl_short", "itl_long", "ttft_short", "ttft_long", "late")
"""`late` is how long after its due time a request was sent, because its client was still busy."""
MEMORIES = ("host", "gpu")
QUANTILES = {"p50": 0.5, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class Found:
    """The findings about one server under traffic.

    Attributes:
        backend: which server.
        seconds: of traffic.
        counts: by the names in COUNTS.
        times: by the names in TIMES.
        growth: by the names in MEMORIES; None where it was not watched. Of several stretches, the largest possible one.
        errors: those that were not provoked, and how often they came.
    """

    backend: str
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    times: dict[str, Latencies] = field(default_factory=lambda: {name: Latencies() for name in TIMES})
    growth: dict[str, Growth | None] = field(default_factory=lambda: dict.fromkeys(MEMORIES))
    errors: Counter[str] = field(default_factory=Counter)

    def take(self, sent: Sent, is_long: bool, late_s: float) -> None:
        """Count a request that has ended."""
        length = "long" if is_long else "short"
        self.times["late"].add(late_s)
        if sent.error:
            self.counts["errors"] += 1
            self.errors[sent.error] += 1
            return
        self.counts[f"answered_{length}" if sent.fate is Fate.ANSWERED else _COUNTED[sent.fate]] += 1
        if sent.ttft_s is not None:
            self.times[f"ttft_{length}"].add(sent.ttft_s)
        self.times[f"itl_{length}"].extend(sent.gaps_s)

    @property
    def density(self) -> float | None:
        """Kept / causal pairs of what ran sparse."""
        return self.counts["kept_pairs"] / self.counts["causal_pairs"] if self.counts["causal_pairs"] else None

    def row(self) -> dict[str, Any]:
        """As a row of a result."""
        row: dict[str, Any] = {"backend": self.backend, "seconds": round(self.seconds, 1)}
        row |= {name: self.counts[name] for name in COUNTS}
        row["density"] = self.density
        for name, times in self.times.items():
            for label, share in QUANTILES.items():
                seconds = times.quantile(share)
                row[f"{name}_{label}_ms"] = None if seconds is None else round(seconds * 1e3, 3)
        for name, grown in self.growth.items():
            row[f"{name}_mib_per_hour"] = grown and grown.per_hour
            row[f"{name}_mib_per_hour_low"] = grown and grown.low
            row[f"{name}_mib_per_hour_high"] = grown and grown.high
            row[f"{name}_mib"] = grown and grown.level
            row[f"{name}_step_mib"] = grown and grown.step
        return row

    def details(self) -> dict[str, Any]:
        """Findings that do not fit into a row."""
        return {"times": {name: times.to_json() for name, times in self.times.items()}, "errors": dict(self.errors)}

    @classmethod
    def from_row(cls, row: dict[str, Any], details: dict[str, Any]) -> "Found":
        growth = {}
        for name in MEMORIES:
            columns = ("mib_per_hour", "mib_per_hour_low", "mib_per_hour_high", "mib", "step_mib")
            known = [row[f"{name}_{column}"] for column in columns]
            growth[name] = None if None in known else Growth(*known)
        times = {name: Latencies.from_json(details["times"][name]) for name in TIMES}
        counts = Counter({name: row[name] for name in COUNTS})
        return cls(row["backend"], row["seconds"], counts, times, growth, Counter(details["errors"]))

    def __add__(self, other: "Found") -> "Found":
        return Found(
            self.backend,
            self.seconds + other.seconds,
            self.counts + other.counts,
            {name: self.times[name] + other.times[name] for name in TIMES},
            {name: _worse(self.growth[name], other.growth[name]) for name in MEMORIES},
            self.errors + other.errors,
        )


_COUNTED = {Fate.CANCELLED: "cancelled", Fate.DROPPED: "dropped", Fate.INVALID: "refused"}


def _worse(one: Growth | None, other: Growth | None) -> Growth | None:
    if one is None or other is None:
        return one or other
    steepest, highest = max(one, other, key=lambda grown: grown.low), max(one, other, key=lambda grown: grown.step)
    return replace(steepest, level=highest.level, step=highest.step)
