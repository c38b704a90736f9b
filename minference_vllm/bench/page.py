# SPDX-License-Identifier: Apache-2.0
"""The report of a benchmark as one HTML file."""

from collections.abc import Iterator
from html import escape
from typing import Any

from minference_vllm.bench import plots
from minference_vllm.bench.compare import METRICS
from minference_vllm.evals.document import document, figures, legend, table

POINT = {"input_len": "read", "output_len": "written", "load": "load"}
ROWS = {
    **POINT,
    "requests": "requests",
    "dense_failed": "failed, dense",
    "sparse_failed": "sparse",
    "ttft_dense": "TTFT, dense",
    "ttft_sparse": "sparse",
    "ttft_speedup": "speed-up",
    "ttft_low": "from",
    "ttft_high": "to",
    "itl_speedup": "speed-up of ITL",
    "tpot_speedup": "of TPOT",
    "e2e_speedup": "of E2E",
    "throughput": "throughput",
    "sparse_share": "ran sparse",
    "density": "density",
    "recall": "recall",
}
LATENCIES = {**POINT, "percentile": "percentile", "dense": "dense, ms", "sparse": "sparse, ms"}
SPEEDUP = {"speedup": "speed-up", "low": "from", "high": "to"}
RATES = {**POINT, "rate": "rate", "dense": "dense", "sparse": "sparse", "ratio": "sparse / dense"}
ERRORS = {**POINT, "server": "server", "request": "request", "error": "error"}
LEGEND = (
    "read, written: tokens of a prompt and of an answer. Times are medians in milliseconds over the requests that both "
    "servers answered: TTFT to the first token, ITL between two tokens, TPOT the mean of a request's tokens after the "
    "first, E2E to the last token. speed-up is dense / sparse, above 1 sparse is faster; from, to is its 95% interval "
    "(paired bootstrap over requests). It is of one run: requests that wait for each other are not independent, so "
    "under load it is too narrow. throughput is sparse / dense tokens a second. ran sparse is the share of prompt "
    "tokens that did, density their kept / causal pairs, recall the attention of held-out rows on the kept keys. "
    "Random tokens have no structure: their density says nothing about prompts that mean something."
)
PERCENTILES = "A percentile of few requests is nearly that of its worst one: the 99th needs hundreds."


def make_page(report: dict[str, Any]) -> str:
    """The file's text."""
    return document(
        "Serving with sparse against dense prefill",
        report,
        [
            table(report["rows"], ROWS),
            legend(LEGEND),
            *figures(report, plots.draw),
            *_latencies(report),
            "<h2>Rates</h2>",
            table(report["rates"], RATES),
            *_errors(report),
        ],
    )


def _latencies(report: dict[str, Any]) -> Iterator[str]:
    for metric, title in METRICS.items():
        rows = [row for row in report["latencies"] if row["metric"] == metric]
        if rows:
            yield f"<h2>{escape(title[0].upper() + title[1:])} ({metric.upper()})</h2>"
            yield table(rows, LATENCIES | SPEEDUP)
    yield legend(PERCENTILES)


def _errors(report: dict[str, Any]) -> Iterator[str]:
    if report["errors"]:
        yield "<h2>Requests that failed, in no time above</h2>"
        yield table(report["errors"], ERRORS)
