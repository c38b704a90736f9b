# SPDX-License-Identifier: Apache-2.0
"""The figures of a captured choice; they need the extra `plot`."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minference_vllm.errors import ConfigError
from minference_vllm.files import reason
from minference_vllm.plots.capture import Capture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_KEY = "#e8e8e8"  # where no row sees a key, or nothing was measured
KEPT, SHARE, RECALL = "Blues", "Blues", "RdYlBu"
PANEL = 1.9  # inches
LETTERS_AN_INCH = 14  # of a title
FORMATS = ("png", "svg")
DPI = 160


def need_matplotlib() -> None:
    """Refuse to go on without matplotlib, before an engine is started in vain.

    Raises:
        ConfigError: it is not installed; the message says how to get it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("Figures need matplotlib: pip install 'minference-vllm[plot]'.") from None


def draw_heads(capture: Capture, position: int, recall: Sequence[float] | None, title: str) -> "Figure":
    """A map for each head of a layer, rows downwards, keys to the right: the darker, the more of a cell is kept."""
    from matplotlib.colors import PowerNorm

    choice = capture.layers[position]
    num_heads = len(choice.kept_pairs)
    across = min(8, max(3, round(num_heads**0.5)), num_heads)
    down = -(-num_heads // across)
    figure = _figure(across * PANEL + 1.1, down * (PANEL + 0.3) + 0.9, title)
    # In thousands of tokens. Cells are whole, so a map may reach beyond the prompt's end.
    rows, keys = (cells * each / 1000 for cells, each in zip(capture.size, capture.cell, strict=True))
    end = capture.num_tokens / 1000
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat
    density, image = choice.density.tolist(), None
    for head, axes in enumerate(panels):
        if head >= num_heads:
            axes.set_axis_off()
            continue
        # A kept column is one key of a cell's sixteen or more, and would not show on a linear scale.
        norm = PowerNorm(0.5, vmin=0, vmax=1)
        shares, extent = choice.shares(head).numpy(), (0, keys, rows, 0)
        image = axes.imshow(shares, cmap=_map(KEPT), norm=norm, extent=extent, interpolation="nearest", aspect="auto")
        axes.set(xlim=(0, end), ylim=(end, 0))
        kept = f"head {head}   density {density[head]:.2f}"
        axes.set_title(kept if recall is None else f"{kept}   recall {recall[head]:.2f}", fontsize=6.5, pad=3)
        axes.tick_params(labelsize=6, length=2, labelbottom=head + across >= num_heads)
    figure.supxlabel("key, thousands of tokens", fontsize=8)
    figure.supylabel("query row, thousands of tokens", fontsize=8)
    if image is not None:
        _bar(figure, image, list(figure.axes), "share of the pairs of a cell that is kept")
    return figure


def draw_model(density: Any, recall: Any, title: str) -> "Figure":
    """Density and recall of every head.

    Args:
        density, recall: [num_layers, num_heads], NaN where a layer ran dense.
        title: over all.
    """
    num_layers, num_heads = density.shape
    tables = ("density", density, SHARE), ("recall", recall, RECALL)
    width, height = 1.6 + 0.16 * num_heads, 1.6 + 0.16 * num_layers
    figure = _figure(len(tables) * max(width, 3.4), min(max(height, 3.4), 20.0), title)
    for axes, (name, table, colours) in zip(figure.subplots(1, len(tables), squeeze=False).flat, tables, strict=True):
        image = axes.imshow(table, cmap=_map(colours), vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        _number(axes, num_layers, num_heads)
        axes.set_title(name, fontsize=9)
        _bar(figure, image, [axes], None)
    return figure


def _figure(width: float, height: float, title: str) -> "Figure":
    """An empty figure of this size in inches. Lines of the title that are too long are broken."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    letters = int(width * LETTERS_AN_INCH)
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, letters)]
    figure.suptitle("\n".join(lines), fontsize=8)
    return figure


def _number(axes: "Axes", num_layers: int, num_heads: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.tick_params(labelsize=7, length=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    axes.set_xlim(-0.5, num_heads - 0.5)
    axes.set_ylim(num_layers - 0.5, -0.5)


def _map(name: str) -> Any:
    """A colour scale that has its own colour for cells without a value."""
    import matplotlib

    return matplotlib.colormaps[name].with_extremes(bad=NO_KEY)


def _bar(figure: "Figure", image: Any, axes: Sequence["Axes"], label: str | None) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, aspect=40)
    bar.ax.tick_params(labelsize=7, length=2)
    if label:
        bar.set_label(label, fontsize=7)


def save(figure: "Figure", folder: Path, name: str) -> list[Path]:
    """Write a figure in every format, and create the folder; the same figure gives the same bytes.

    Raises:
        ConfigError: a file cannot be written.
    """
    import matplotlib

    paths = [folder / f"{name}.{suffix}" for suffix in FORMATS]
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        for path in paths:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
            except OSError as error:
                raise ConfigError(f"{path} cannot be written: {reason(error)}.") from None
    return paths
