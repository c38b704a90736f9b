# SPDX-License-Identifier: Apache-2.0
"""What reports have in common: a JSON file, and an HTML file that is complete in itself."""

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from minference_vllm.files import write_file

JSON_REPORT, HTML_REPORT = "report.json", "report.html"
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


def write_reports(folder: Path, report: dict[str, Any], page: str) -> None:
    """Put a report into its folder.

    Args:
        page: the report as HTML.
    """
    for name, text in ((JSON_REPORT, f"{json.dumps(report, indent=1, allow_nan=False)}\n"), (HTML_REPORT, page)):
        write_file(folder / name, text, str(folder / name))


def document(title: str, report: dict[str, Any], parts: Iterable[str]) -> str:
    """The HTML file's text: warnings and notes first, then `parts`, then the command and its settings."""
    body = [
        f"<h1>{escape(title)}</h1>",
        *(f'<p class="warning">{escape(warning)}</p>' for warning in report["warnings"]),
        f"<p>{escape(_subject(report))}</p>",
        *(f"<p>{escape(note)}</p>" for note in report["notes"]),
        *parts,
        "<h2>How it was made</h2>",
        f"<pre>{escape(report['command'])}</pre>",
        f"<pre>{escape(json.dumps(report['settings'], indent=1))}</pre>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<title>{escape(title)}</title></head><body>\n'
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """A table in HTML.

    Args:
        columns: the columns' titles by the rows' field names.
    """
    head = "".join(f"<th>{escape(title)}</th>" for title in columns.values())
    body = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell(row[name]))}</td>" for name in columns) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def legend(text: str) -> str:
    """What stands below a table."""
    return f'<p class="legend">{escape(text)}</p>'


def cell(value: Any) -> str:
    """A value of a report as the text of a table's cell."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def figures(report: dict[str, Any], draw: Callable[[dict[str, Any]], Iterator[tuple[str, str]]]) -> Iterator[str]:
    """Figures in HTML.

    Args:
        draw: gives the caption and the SVG of each figure; it needs matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        yield f"<p>{escape(NO_PLOTS)}</p>"
        return
    for caption, svg in draw(report):
        yield f"<h2>{escape(caption)}</h2><figure>{svg}</figure>"


def _subject(report: dict[str, Any]) -> str:
    settings = report["settings"]
    servers = {name: settings[name] for name in ("dense", "sparse", "control") if name in settings}
    versions = ", ".join(sorted({version for server in servers.values() for version in server["vllm"]}))
    named = " ".join(f"{name.capitalize()}: {server['server']}." for name, server in servers.items())
    return f"{settings['dense']['model']} on vLLM {versions}, {report['date']}. {named}"
