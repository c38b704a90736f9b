# SPDX-License-Identifier: Apache-2.0
"""The report of an evaluation as one HTML file."""

from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

from minference_vllm.evals import plots
from minference_vllm.evals.document import document, figures, legend, table
from minference_vllm.evals.paired import EQUAL

COLUMNS = {
    "task": "task",
    "tokens": "tokens",
    "samples": "samples",
    "errors": "errors",
    "dense_score": "dense",
    "sparse_score": "sparse",
    "loss": "loss",
    "low": "from",
    "high": "to",
    "lost": "lost",
    "gained": "gained",
    "p_value": "p",
    "kl": "KL, at least",
    "density": "density",
    "recall": "recall",
    "redone": "redone",
}
CONTROL_COLUMNS = {
    "control_score": "control",
    "control_loss": "its loss",
    "control_low": "from",
    "control_high": "to",
    "control_lost": "lost",
    "control_gained": "gained",
}
CONTROL_LEGEND = (
    "control is the third server, compared with dense attention as the sparse one is. If it keeps every key, its loss "
    "and the samples that it lost or gained are what rounding alone changes."
)
LEGEND = (
    "loss is dense less sparse score; from, to is its 95% interval (paired bootstrap over samples). lost and "
    "gained are samples that are worse or better with sparse; p is the exact sign test on them, which is "
    "McNemar's where samples are right or wrong. density is kept / causal pairs of what ran sparse; recall is the "
    "attention of held-out rows on the kept keys, before the guard had a share of the heads, redone, attend to "
    "all keys. Scores of position are mean log-probabilities of a token; all others lie between 0 and 1. KL is "
    "that of the next token's distribution, sparse from dense, as far as the 20 likeliest tokens of both tell: at "
    "least so much."
)


LOST = {
    "task": "task",
    "tokens": "tokens",
    "id": "sample",
    "dense": "dense",
    "sparse": "sparse",
    "density": "density",
    "recall": "recall",
    "batch": "of a batch of",
}
MOST_LOST = 50
LOST_LEGEND = (
    "Those that lost most come first. density and recall are of the batch that a sample was answered in, so of it "
    "alone where that is 1, as with --concurrency 1; report.json has them for every sample."
)


def make_page(report: dict[str, Any]) -> str:
    """The file's text."""
    return document(
        "Sparse against dense prefill",
        report,
        [
            *_rows(report),
            *figures(report, plots.draw),
            *_lost(report),
            *_left_out(report),
            *_errors(report),
        ],
    )


def _rows(report: dict[str, Any]) -> Iterator[str]:
    has_control = "control" in report["settings"]
    columns = COLUMNS | CONTROL_COLUMNS if has_control else COLUMNS
    yield table([*report["rows"], *mean_row(report, columns)], columns)
    yield legend(LEGEND)
    if has_control:
        yield legend(CONTROL_LEGEND)


def mean_row(report: dict[str, Any], columns: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The mean as a table's last row, if there is one."""
    if mean := report["mean"]:
        yield {**dict.fromkeys(columns), **mean, "task": f"mean of {mean['rows']}"}


def _lost(report: dict[str, Any]) -> Iterator[str]:
    scored = [prompt for prompt in report["prompts"] if prompt["dense"] is not None]
    lost = [prompt for prompt in scored if prompt["dense"] - prompt["sparse"] > EQUAL]
    lost.sort(key=lambda prompt: prompt["sparse"] - prompt["dense"])
    if lost:
        some = f": the {MOST_LOST} that lost most of {len(lost):,}" if len(lost) > MOST_LOST else ""
        yield f"<h2>Samples that lost{some}</h2>"
        yield table(lost[:MOST_LOST], LOST)
        yield legend(LOST_LEGEND)


def _left_out(report: dict[str, Any]) -> Iterator[str]:
    if report["left_out"]:
        yield "<h2>Tasks that were left out</h2><ul>"
        yield from (f"<li>{escape(f'{name}: {why}')}</li>" for name, why in report["left_out"].items())
        yield "</ul>"


def _errors(report: dict[str, Any]) -> Iterator[str]:
    if report["errors"]:
        yield "<h2>Samples without an answer, in no score</h2>"
        yield table(report["errors"], {"id": "sample", "server": "server", "error": "error"})
