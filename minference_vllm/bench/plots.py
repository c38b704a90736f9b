# SPDX-License-Identifier: Apache-2.0
"""Figures of a benchmark's report, as SVG text. They need matplotlib, the extra `plot`."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from minference_vllm.evals.plots import DENSE_COLOR, SPARSE_COLOR, Drawing, draw_all, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3  # of small figures side by side
WIDTH, HEIGHT = 7.5, 2.4  # inches: of all of them, of one
WORDS = {"input_len": "read", "output_len": "written"}
WIDE = 8  # times as much: from there on a linear axis shows the largest ratios alone
COLORS = {"dense": DENSE_COLOR, "sparse": SPARSE_COLOR}
MARKS = {
    "ttft": ("o", "time to first token"),
    "tpot": ("s", "time of a later token"),
    "e2e": ("^", "time to last token"),
}


def draw(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Caption and SVG of each figure."""
    rows = [row for row in report["rows"] if row["ttft_dense"] is not None]
    lengths = _groups(rows, ("output_len", "load"), "input_len")
    rates = _groups(rows, ("input_len", "output_len"), "rate")
    in_flight = _groups(rows, ("input_len", "output_len"), "concurrency")
    return draw_all({**report, "lengths": lengths, "rates": rates, "in_flight": in_flight}, FIGURES)


def _groups(rows: Sequence[dict[str, Any]], fixed: tuple[str, ...], varied: str) -> list[tuple[str, list[Any]]]:
    """Groups of rows that differ in `varied` only, named by what they have in common; single rows are left out."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in fixed if row[name] is not None)

    known = sorted((row for row in rows if row[varied] is not None), key=key)
    groups = [sorted(group, key=lambda row: row[varied]) for _, group in itertools.groupby(known, key)]
    return [(_name({name: group[0][name] for name in fixed}), group) for group in groups if len(group) > 1]


def _speedups(figure: "Figure", report: dict[str, Any]) -> None:
    """Speed-ups of the medians, with their intervals."""
    names = [_name(row) for row in report["rows"]]
    figure.set_size_inches(WIDTH, 1.4 + 0.45 * len(names))
    axes = figure.add_subplot()
    for offset, (metric, (mark, label)) in zip((-0.22, 0, 0.22), MARKS.items(), strict=True):
        medians = [row for row in report["latencies"] if row["metric"] == metric and row["percentile"] == 50]
        medians = [row for row in medians if row["speedup"] is not None]
        places = [names.index(_name(row)) + offset for row in medians]
        for place, row in zip(places, medians, strict=True):
            if row["low"] is not None:
                axes.plot([row["low"], row["high"]], [place, place], color=SPARSE_COLOR, linewidth=1.5)
        axes.plot([row["speedup"] for row in medians], places, mark, color=SPARSE_COLOR, markersize=5, label=label)
    axes.axvline(1, color=DENSE_COLOR, linewidth=1)
    left, right = axes.dataLim.intervalx
    if right > WIDE * left > 0:
        axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("dense / sparse (right of the line, sparse is faster)")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    plain(axes)


def _distributions(figure: "Figure", report: dict[str, Any]) -> None:
    """The share of the requests that have their first token, over time."""
    for axes, of_point in _small(figure, report["distributions"]):
        for server, color in COLORS.items():
            times = [0.0, *of_point[server]]
            shares = [number / (len(times) - 1) for number in range(len(times))]
            axes.step(times[:1] + times[1:], shares, where="post", color=color, linewidth=1.2, label=server)
        axes.set_title(_name(of_point), fontsize=7)
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("ms")


def _by_length(figure: "Figure", report: dict[str, Any]) -> None:
    _lines(figure, report["lengths"], "input_len", "tokens read")


def _by_rate(figure: "Figure", report: dict[str, Any]) -> None:
    _lines(figure, report["rates"], "rate", "requests a second")


def _by_concurrency(figure: "Figure", report: dict[str, Any]) -> None:
    _lines(figure, report["in_flight"], "concurrency", "requests in flight")


def _lines(figure: "Figure", groups: Sequence[tuple[str, list[Any]]], varied: str, label: str) -> None:
    """Medians of the time to the first token."""
    for axes, (name, rows) in _small(figure, groups):
        for server, color in COLORS.items():
            times = [row[f"ttft_{server}"] for row in rows]
            axes.plot([row[varied] for row in rows], times, "o-", color=color, markersize=3, label=server)
        axes.set_title(name, fontsize=7)
        axes.set_xscale("log", base=2)
        ticks = [row[varied] for row in rows]
        axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
        axes.set_ylim(bottom=0)
        axes.set_xlabel(label)


def _small(figure: "Figure", items: Sequence[Any]) -> Iterator[tuple["Axes", Any]]:
    """A small figure for each item; the first has the legend."""
    lines = -(-len(items) // COLUMNS)
    figure.set_size_inches(WIDTH, HEIGHT * lines)
    places = figure.subplots(lines, COLUMNS, squeeze=False)
    for number, axes in enumerate(places.flat):
        if number >= len(items):
            axes.remove()
            continue
        yield axes, items[number]
        plain(axes)
        if number % COLUMNS == 0:
            axes.set_ylabel("share of requests" if axes.get_xlabel() == "ms" else "ms")
        if number == 0:
            axes.legend(fontsize=7, frameon=False)


def _name(row: dict[str, Any]) -> str:
    """The name of a point, or of what several points have in common."""
    lengths = (f"{row[name]:,} {word}" for name, word in WORDS.items() if row.get(name) is not None)
    return ", ".join(filter(None, (*lengths, row.get("load"))))


FIGURES: tuple[Drawing, ...] = (
    ("latencies", "Speed-up of medians, with its 95% interval", _speedups),
    ("distributions", "Share of the requests whose first token has come", _distributions),
    ("lengths", "Time to first token by length of the prompt, median", _by_length),
    ("rates", "Time to first token by rate, median", _by_rate),
    ("in_flight", "Time to first token by requests in flight, median", _by_concurrency),
)
