# SPDX-License-Identifier: Apache-2.0
"""Compares both servers' measurements in rows by point, in the format of the files under benchmarks/results."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from minference_vllm.bench.compare import Latency, compare, values
from minference_vllm.bench.load import Point
from minference_vllm.bench.measure import Measurements
from minference_vllm.bench.request import Measured, Request
from minference_vllm.errors import ConfigError
from minference_vllm.evals.report import NOT_SPARSE, described_server, rounded

OTHER_LENGTHS = (
    "The servers wrote answers of different length: times to the last token and rates compare other work too."
)
MEDIAN = 50


@dataclass(frozen=True, slots=True)
class Compared:
    """A point on both servers, with the requests that both have answered."""

    point: Point
    dense: Measured
    sparse: Measured
    pairs: tuple[tuple[Request, Request], ...]

    @property
    def place(self) -> dict[str, Any]:
        """The fields that tell a point's rows from others."""
        return {"input_len": self.point.input_len, "output_len": self.point.output_len, "load": self.point.load}


def make_report(points: Sequence[Point], dense: Measurements, sparse: Measurements) -> dict[str, Any]:
    """All figures, as JSON. Every point has been measured on both servers.

    Raises:
        ConfigError: the servers were not sent the same.
    """
    seed = int(dense.origin.load["seed"] or 0)
    compared = [_pair(point, dense.of(point), sparse.of(point)) for point in points]
    latencies = [compare(one.pairs, seed) if one.pairs else [] for one in compared]
    return {
        "settings": {
            **dense.origin.load,
            "dense": described_server(dense.origin, (entry.vllm for entry in dense.lines)),
            "sparse": described_server(sparse.origin, (entry.vllm for entry in sparse.lines)),
        },
        "warnings": [] if any(one.sparse.work.sparse_tokens for one in compared) else [NOT_SPARSE],
        "notes": [OTHER_LENGTHS] if any(_is_uneven(one) for one in compared) else [],
        "errors": [error for one in compared for error in _errors(one)],
        "rows": [_row(one, found) for one, found in zip(compared, latencies, strict=True)],
        "latencies": [
            rounded({**one.place, **latency._asdict()})
            for one, found in zip(compared, latencies, strict=True)
            for latency in found
        ],
        "rates": [rate for one in compared for rate in _rates(one)],
        "distributions": [_distribution(one) for one in compared if one.pairs],
    }


def _pair(point: Point, dense: Measured | None, sparse: Measured | None) -> Compared:
    assert dense is not None and sparse is not None
    counts = len(dense.requests), len(sparse.requests)
    if counts[0] != counts[1]:
        raise ConfigError(
            f"The dense server was sent {counts[0]} requests at {point.load}, the sparse one {counts[1]}: the data set "
            "has changed. Take another folder."
        )
    both = zip(dense.requests, sparse.requests, strict=True)
    return Compared(point, dense, sparse, tuple((one, other) for one, other in both if not (one.error or other.error)))


def _row(one: Compared, latencies: Sequence[Latency]) -> dict[str, Any]:
    """Medians of a point, and what ran sparse in it; None where there is nothing."""
    row: dict[str, Any] = {
        **one.place,
        "rate": one.point.rate,
        "concurrency": one.point.concurrency,
        "requests": len(one.pairs),
        "dense_failed": len(one.dense.requests) - len(one.dense.answered),
        "sparse_failed": len(one.sparse.requests) - len(one.sparse.answered),
        **dict.fromkeys(("ttft_dense", "ttft_sparse", "ttft_speedup", "ttft_low", "ttft_high")),
        **dict.fromkeys(("itl_speedup", "tpot_speedup", "e2e_speedup")),
    }
    for latency in latencies:
        if latency.percentile == MEDIAN:
            row[f"{latency.metric}_speedup"] = latency.speedup
            if latency.metric == "ttft":
                row |= {f"ttft_{name}": getattr(latency, name) for name in ("dense", "sparse", "low", "high")}
    [row["throughput"]] = [rate["ratio"] for rate in _rates(one) if rate["rate"] == THROUGHPUT]
    work = one.sparse.work
    row |= {
        "density": work.density,
        "recall": work.recall,
        "sparse_share": work.sparse_tokens / work.tokens if work.tokens else None,
        "sparse_tokens": work.sparse_tokens,
        "dense_tokens": work.dense_tokens,
    }
    return rounded(row)


THROUGHPUT = "tokens a second, read and written"


def _rates(one: Compared) -> Iterator[dict[str, Any]]:
    """The rates of each server, over all requests that it has answered."""
    counts = {
        "requests a second": lambda request: 1,
        "tokens written a second": lambda request: request.output_tokens,
        THROUGHPUT: lambda request: request.input_tokens + request.output_tokens,
    }
    for name, count in counts.items():
        dense, sparse = (sum(map(count, side.answered)) / side.duration for side in (one.dense, one.sparse))
        yield rounded(
            {**one.place, "rate": name, "dense": dense, "sparse": sparse, "ratio": sparse / dense if dense else None}
        )


def _distribution(one: Compared) -> dict[str, Any]:
    """Times to the first token in milliseconds, from the shortest to the longest."""
    sides = zip(*one.pairs, strict=True)
    ordered = [sorted(round(1e3 * values(request, "ttft")[0], 3) for request in side) for side in sides]
    return {**one.place, "dense": ordered[0], "sparse": ordered[1]}


def _is_uneven(one: Compared) -> bool:
    return any(dense.output_tokens != sparse.output_tokens for dense, sparse in one.pairs)


def _errors(one: Compared) -> Iterator[dict[str, Any]]:
    for server, measured in (("dense", one.dense), ("sparse", one.sparse)):
        for number, request in enumerate(measured.requests):
            if request.error:
                yield {**one.place, "server": server, "request": number, "error": request.error}
