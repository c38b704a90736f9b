# SPDX-License-Identifier: Apache-2.0
"""Two servers' latencies side by side, over the requests that both have answered."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from minference_vllm.bench.request import Request
from minference_vllm.evals.extras import need
from minference_vllm.evals.paired import TAILS

RESAMPLES = 2000
MOST_AT_ONCE = 2**21  # values of resamples that are in memory together
PERCENTILES = (50, 90, 99)
METRICS = {
    "ttft": "time to first token",
    "itl": "time between two tokens",
    "tpot": "mean time of a token after the first",
    "e2e": "time to last token",
}


class Latency(NamedTuple):
    """A percentile of a latency on both servers.

    Attributes:
        metric, percentile: which.
        dense, sparse: milliseconds.
        speedup: dense / sparse: above 1 sparse is faster.
        low, high: its 95% interval by a bootstrap over requests; None of a single request.
    """

    metric: str
    percentile: int
    dense: float
    sparse: float
    speedup: float | None
    low: float | None
    high: float | None


def compare(pairs: Sequence[tuple[Request, Request]], seed: int) -> list[Latency]:
    """The latencies of all metrics that the requests have: answers of one token have no time between tokens.

    Args:
        pairs: dense and sparse answers to the same requests.
        seed: of the bootstrap.
    """
    numpy = need("numpy")
    number, servers = len(pairs), tuple(zip(*pairs, strict=True))
    # Both servers get the same resamples, because a request that is hard for one is hard for the other.
    drawn = numpy.random.default_rng(seed).multinomial(number, [1 / number] * number, RESAMPLES)
    counts = numpy.vstack([numpy.ones((1, number), dtype=int), drawn[: len(drawn) if number > 1 else 0]])
    return [latency for metric in METRICS for latency in _compared(metric, servers, counts)]


def values(request: Request, metric: str) -> tuple[float, ...]:
    """The request's values of a metric, in seconds: none, one or several."""
    if metric == "ttft":
        return (request.ttft,)
    if metric == "itl":
        return request.gaps
    if metric == "e2e":
        return (request.latency,)
    later = request.output_tokens - 1
    return ((request.latency - request.ttft) / later,) if later > 0 else ()


def _compared(metric: str, servers: tuple[Sequence[Request], ...], counts: Any) -> Iterator[Latency]:
    numpy = need("numpy")
    pools = [_Pool([values(request, metric) for request in requests]) for requests in servers]
    if any(len(pool.values) == 0 for pool in pools):
        return
    # [1 + resamples, percentiles]; the first row is the measurement itself.
    dense, sparse = (pool.percentiles(counts) for pool in pools)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        ratios = dense / sparse
    for at, percentile in enumerate(PERCENTILES):
        low = high = None
        if len(ratios) > 1 and numpy.isfinite(drawn := ratios[1:, at]).all():
            low, high = map(float, numpy.percentile(drawn, TAILS))
        speedup = float(ratios[0, at]) if numpy.isfinite(ratios[0, at]) else None
        yield Latency(metric, percentile, 1e3 * float(dense[0, at]), 1e3 * float(sparse[0, at]), speedup, low, high)


class _Pool:
    """All requests' values of a metric. A resampled request brings all its values along, as often as it was drawn."""

    def __init__(self, by_request: Sequence[Sequence[float]]) -> None:
        numpy = need("numpy")
        pooled = numpy.array([value for of_one in by_request for value in of_one], dtype=float)
        owners = numpy.repeat(numpy.arange(len(by_request)), [len(of_one) for of_one in by_request])
        order = numpy.argsort(pooled, kind="stable")
        self.values, self._owners = pooled[order], owners[order]

    def percentiles(self, counts: Any) -> Any:
        """As numpy.percentile of the values, each taken as often as its request was drawn; NaN if none was drawn.

        Args:
            counts: [draws, requests] how often each request was drawn.

        Returns:
            [draws, percentiles].
        """
        numpy = need("numpy")
        at_once = max(1, MOST_AT_ONCE // len(self.values))
        parts = [self._some(counts[start : start + at_once]) for start in range(0, len(counts), at_once)]
        return numpy.concatenate(parts)

    def _some(self, counts: Any) -> Any:
        numpy = need("numpy")
        up_to = numpy.cumsum(counts[:, self._owners], axis=1)
        last = up_to[:, -1]
        found = numpy.full((len(counts), len(PERCENTILES)), numpy.nan)
        for at, percentile in enumerate(PERCENTILES):
            ranks = numpy.maximum(last - 1, 0) * percentile / 100
            below = numpy.floor(ranks)
            # A value holds the ranks below the count of values drawn up to and including it.
            low, high = (
                self.values[numpy.minimum((up_to <= rank[:, None]).sum(axis=1), len(self.values) - 1)]
                for rank in (below, numpy.ceil(ranks))
            )
            found[:, at] = low + (ranks - below) * (high - low)
        found[last == 0] = numpy.nan
        return found
