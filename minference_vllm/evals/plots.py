# SPDX-License-Identifier: Apache-2.0
"""Figures of a report, as SVG text. They need matplotlib, the extra `plot`."""

import io
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# As many as there are tasks, RULER's included: those of matplotlib's tab20.
TASK_COLORS = (
    "#1f77b4", "#aec7e8", "#ff7f0e", "#ffbb78", "#2ca02c", "#98df8a", "#d62728", "#ff9896", "#9467bd", "#c5b0d5",
    "#8c564b", "#c49c94", "#e377c2", "#f7b6d2", "#7f7f7f", "#c7c7c7", "#bcbd22", "#dbdb8d", "#17becf", "#9edae5",
)  # fmt: skip
DENSE_COLOR, SPARSE_COLOR = "#5f6b7a", "#c2410c"
Draw = Callable[["Figure", dict[str, Any]], None]
Drawing = tuple[str, str, Draw]
"""The part of a report that a figure needs, the figure's caption, and the function that draws it."""


def draw(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Caption and SVG of each figure of an evaluation."""
    return draw_all(report, FIGURES)


def draw_all(report: dict[str, Any], drawings: Sequence[Drawing]) -> Iterator[tuple[str, str]]:
    """Caption and SVG of each figure for which the report has something to show."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    for key, caption, paint in drawings:
        if report[key]:
            figure, svg = Figure(layout="constrained"), io.StringIO()
            with rc_context({"svg.hashsalt": key + caption, "svg.fonttype": "none", "font.size": 9}):
                paint(figure, report)
                figure.savefig(svg, format="svg", metadata={"Date": None})
            text = svg.getvalue()
            yield caption, text[text.index("<svg") :]  # an XML prologue has no place within HTML


def _losses(figure: "Figure", report: dict[str, Any]) -> None:
    rows = [row for row in reversed(report["rows"]) if row["loss"] is not None]
    figure.set_size_inches(7.5, 1.2 + 0.26 * len(rows))
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        if row["low"] is not None:
            axes.plot([row["low"], row["high"]], [place, place], color=SPARSE_COLOR, linewidth=2, solid_capstyle="butt")
        axes.plot(row["loss"], place, "o", color=SPARSE_COLOR, markersize=4)
    axes.axvline(0, color=DENSE_COLOR, linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['task']}, {row['tokens']:,}" for row in rows])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("loss: dense less sparse score (right of the line, sparse is worse)")
    plain(axes)


def _densities(figure: "Figure", report: dict[str, Any]) -> None:
    figure.set_size_inches(7.5, 3.2)
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=TASK_COLORS)
    for task in dict.fromkeys(row["task"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["task"] == task and row["density"] is not None]
        rows.sort(key=lambda row: row["tokens"])
        if rows:
            axes.plot([row["tokens"] for row in rows], [row["density"] for row in rows], "o-", markersize=3, label=task)
    lengths = sorted({row["tokens"] for row in report["rows"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.set_ylabel("kept / causal pairs")
    if axes.lines:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    plain(axes)


def _depths(figure: "Figure", report: dict[str, Any]) -> None:
    """Two maps for each task, with lengths across and depths down."""
    tasks = list(dict.fromkeys(cell["task"] for cell in report["depths"]))
    figure.set_size_inches(7.5, 3.2 * len(tasks))
    places = figure.subplots(len(tasks), 2, squeeze=False)
    for task, pair in zip(tasks, places, strict=True):
        cells = [cell for cell in report["depths"] if cell["task"] == task]
        lengths = sorted({cell["tokens"] for cell in cells})
        bands = sorted({_band(cell["depth"]) for cell in cells})
        for axes, server in zip(pair, ("dense", "sparse"), strict=True):
            image = axes.imshow(
                [[_mean(cells, length, band, server) for length in lengths] for band in bands],
                cmap="viridis", vmin=0, vmax=1, aspect="auto",
            )  # fmt: skip
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
            axes.set_yticks(range(len(bands)), [f"{band:.0%}" for band in bands])
            axes.set_title(f"{task}, {server}", fontsize=9)
            axes.set_xlabel("tokens")
        pair[0].set_ylabel("depth, from")
        figure.colorbar(image, ax=list(pair), label="score")


def _positions(figure: "Figure", report: dict[str, Any]) -> None:
    """For each length, how much worse each token is predicted."""
    figure.set_size_inches(7.5, 3.2)
    axes = figure.add_subplot()
    for tokens in sorted({point["tokens"] for point in report["positions"]}):
        points = [point for point in report["positions"] if point["tokens"] == tokens]
        losses = [point["sparse"] - point["dense"] for point in points]
        axes.plot([point["up_to"] for point in points], losses, "o-", markersize=3, label=f"{tokens:,} tokens")
    axes.axhline(0, color=DENSE_COLOR, linewidth=1)
    axes.set_xlabel("position in the prompt")
    axes.set_ylabel("nats a token, sparse less dense")
    axes.legend(fontsize=8, frameon=False)
    plain(axes)


def _band(depth: float) -> float:
    """The beginning of the tenth of the prompt in which a depth lies; depths are told apart by tenths."""
    return min(int(depth * 10), 9) / 10


def _mean(cells: Sequence[dict[str, Any]], length: int, band: float, server: str) -> float:
    here = [cell for cell in cells if cell["tokens"] == length and _band(cell["depth"]) == band]
    samples = sum(cell["samples"] for cell in here)
    return sum(cell[server] * cell["samples"] for cell in here) / samples if samples else float("nan")


def plain(axes: "Axes") -> None:
    """Remove the top and right lines of the frame."""
    axes.spines[["top", "right"]].set_visible(False)


FIGURES: tuple[Drawing, ...] = (
    ("rows", "Loss by task and length, with its 95% interval", _losses),
    ("rows", "Density of what ran sparse", _densities),
    ("depths", "Score by length and depth", _depths),
    ("positions", "How much worse tokens are foreseen, by their position", _positions),
)
