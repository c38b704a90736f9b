# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML file that needs no other."""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from minference_vllm.evals import plots

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
LEGEND = (
    "loss is dense less sparse score; from, to is its 95% interval (paired bootstrap over samples). lost and "
    "gained are samples that are worse or better with sparse; p is the exact sign test on them, which is "
    "McNemar's where samples are right or wrong. density is kept / causal pairs of what ran sparse; recall is the "
    "attention of held-out rows on the kept keys, before the guard had a share of the heads, redone, attend to "
    "all keys. Scores of position are mean log-probabilities of a token; all others lie between 0 and 1. KL is "
    "that of the next token's distribution, sparse from dense, as far as the 20 likeliest tokens of both tell: at "
    "least so much."
)
NO_PLOTS = "There are no figures: they need matplotlib, pip install 'minference-vllm[plot]'."
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.85rem }
.wide { overflow-x: auto }
th, td { padding: 0.2rem 0.5rem; text-align: right; border-bottom: 1px solid #8884 }
th:first-child, td:first-child { text-align: left }
.warning { border: 2px solid #c2410c; padding: 0.6rem 1rem; font-weight: bold }
.legend { font-size: 0.85rem; opacity: 0.85 }
figure { margin: 1.5rem 0 } figure svg { max-width: 100%; height: auto; background: white }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 0.8rem }
"""


def make_page(report: dict[str, Any]) -> str:
    """The file's text."""
    parts = [
        "<h1>Sparse against dense prefill</h1>",
        *(f'<p class="warning">{escape(warning)}</p>' for warning in report["warnings"]),
        f"<p>{escape(_subject(report))}</p>",
        _table(report["rows"], COLUMNS),
        f'<p class="legend">{escape(LEGEND)}</p>',
        *_figures(report),
        *_left_out(report),
        *_errors(report),
        "<h2>How it was made</h2>",
        f"<pre>{escape(report['command'])}</pre>",
        f"<pre>{escape(json.dumps(report['settings'], indent=1))}</pre>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    title = "<title>Sparse against dense prefill</title>"
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}{title}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
    )


def cell(value: Any) -> str:
    """A figure as a reader wants it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _subject(report: dict[str, Any]) -> str:
    dense, sparse = (report["settings"][name] for name in ("dense", "sparse"))
    versions = ", ".join(sorted({*dense["vllm"], *sparse["vllm"]}))
    return (
        f"{dense['model']} on vLLM {versions}, {report['date']}. Dense: {dense['server']}. Sparse: {sparse['server']}."
    )


def _table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in columns.values())
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell(row[name]))}</td>" for name in columns) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _figures(report: dict[str, Any]) -> Iterator[str]:
    if importlib.util.find_spec("matplotlib") is None:
        yield f"<p>{escape(NO_PLOTS)}</p>"
        return
    for caption, svg in plots.draw(report):
        yield f"<h2>{escape(caption)}</h2><figure>{svg}</figure>"


def _left_out(report: dict[str, Any]) -> Iterator[str]:
    if report["left_out"]:
        yield "<h2>Tasks that were left out</h2><ul>"
        yield from (f"<li>{escape(f'{name}: {why}')}</li>" for name, why in report["left_out"].items())
        yield "</ul>"


def _errors(report: dict[str, Any]) -> Iterator[str]:
    if report["errors"]:
        yield "<h2>Samples without an answer, in no score</h2>"
        yield _table(report["errors"], {"id": "sample", "server": "server", "error": "error"})
