# SPDX-License-Identifier: Apache-2.0
"""Figures of a result of benchmarks.attention, made from its JSON alone; they need the extra `plot`.

python -m benchmarks.plots benchmarks/results/h100-attention.json --out docs/figures/
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Kernel(NamedTuple):
    """How a kernel is drawn: its label, and the fields of its time and of the share of pairs that it attends to."""

    label: str
    ms: str
    kept: str | None
    color: str


KERNELS = (
    Kernel("ours, paged", "ours_ms", "kept", "#d62728"),
    Kernel("MInference Triton", "mi_triton_ms", "kept_64x64", "#9467bd"),
    Kernel("FA2 vertical-slash (vLLM)", "fa2_sparse_ms", "kept_64x64", "#1f77b4"),
    Kernel("FA3 dense, paged (vLLM)", "fa3_paged_ms", None, "#7f7f7f"),
    Kernel("FA3 dense, contiguous", "fa3_contiguous_ms", None, "#bcbcbc"),
)


def label(row: dict[str, Any]) -> str:
    """What tells a row from the others."""
    shape = f"{row['tokens'] // 1024}K, {row['num_qo_heads']}/{row['num_kv_heads']} heads of {row['head_dim']}"
    return f"{row['vertical']} / {row['slash']}\n{shape}"


def tflops(row: dict[str, Any], kernel: Kernel) -> float | None:
    """TFLOP/s on the pairs that this kernel attends to, by its own tiles; None if something was not measured.

    A dense kernel attends to all causal pairs.
    """
    kept = 1.0 if kernel.kept is None else row[kernel.kept]
    if row[kernel.ms] is None or kept is None:
        return None
    pairs = kept * row["num_qo_heads"] * row["tokens"] * (row["tokens"] + 1) / 2
    return 4 * row["head_dim"] * pairs / row[kernel.ms] / 1e9


def caption(result: dict[str, Any]) -> str:
    return f"{result['gpu']}, vLLM {result['vllm']}, torch {result['torch']}, {result['date'][:10]}"


def draw_ms(result: dict[str, Any]) -> "Figure":
    """Bars: milliseconds of every kernel, by case. The scale is logarithmic: dense takes up to 62 times as long."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(max(2.2 * len(rows), 6.0) + 1.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    width = 0.84 / len(KERNELS)
    for at, kernel in enumerate(KERNELS):
        measured = [(place, row[kernel.ms]) for place, row in enumerate(rows) if row[kernel.ms] is not None]
        if measured:
            places = [place + (at - (len(KERNELS) - 1) / 2) * width for place, _ in measured]
            bars = axes.bar(places, [ms for _, ms in measured], width, label=kernel.label, color=kernel.color)
            axes.bar_label(bars, fmt="%.3g", fontsize=7, padding=1)
    axes.set_yscale("log")
    axes.set_ylabel("ms a layer, lower is better (log scale)")
    axes.set_xticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
    axes.set_xlabel("verticals / slashes")
    axes.margins(x=0.02, y=0.1)
    axes.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.suptitle(f"Attention of one prompt, {caption(result)}", fontsize=10)
    return figure


def draw_tflops(result: dict[str, Any]) -> "Figure":
    """Points below the card's limit: TFLOP/s on kept pairs, against the share of pairs that is kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for kernel in KERNELS:
        points = [
            (1.0 if kernel.kept is None else row[kernel.kept], reached, row["head_dim"])
            for row in result["rows"]
            if (reached := tflops(row, kernel)) is not None
        ]
        for head_dim, marker in ((128, "o"), (64, "^")):
            chosen = [(kept, reached) for kept, reached, dim in points if dim == head_dim]
            if chosen:
                name = kernel.label if head_dim == 128 else f"{kernel.label}, head_dim 64"
                axes.scatter(*zip(*chosen, strict=True), marker=marker, color=kernel.color, label=name)
    roof = result["settings"]["bf16_matmul_tflops"]
    if roof:
        axes.axhline(roof, color="black", linewidth=1, linestyle="--")
        axes.annotate(f"bf16 matrix product: {roof:.0f}", (0.01, roof), xycoords=("axes fraction", "data"), va="bottom")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.05 * max(roof or 0, axes.get_ylim()[1]))
    axes.set_xlabel("share of the causal pairs that the kernel attends to, by its own tiles (log scale)")
    axes.set_ylabel("TFLOP/s on those pairs")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(f"Speed on kept work, {caption(result)}", fontsize=10)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Write an SVG that has the same bytes whenever it is made."""
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="what benchmarks.attention has written")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the figures")
    options = parser.parse_args()
    result = json.loads(options.result.read_text())
    for name, draw in (("ms", draw_ms), ("tflops", draw_tflops)):
        path = options.out / f"{options.result.stem}-{name}.svg"
        save(draw(result), path)
        print(path)


if __name__ == "__main__":
    main()
