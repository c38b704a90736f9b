# SPDX-License-Identifier: Apache-2.0
"""The figures of benchmarks.attention: what they show of its rows, and that they are made from the JSON alone."""

import json
import sys

import pytest

from benchmarks import attention, plots
from benchmarks.cases import TINY

OURS_ALONE = [
    attention.make_row(case, {"kept": 0.25, "ours_ms": 2.0, "choose_ms": 1.0, "chunks_ms": 4.0}) for case in TINY
]
WITH_PEERS = [
    {**row, **{name: 2.0 for name in row if name.endswith("_ms")}, "kept_64x64": 0.1} for row in OURS_ALONE
]  # fmt: skip
ORIGIN = {"gpu": "a card", "vllm": "0", "torch": "0", "date": "2026-11-23T00:00:00+00:00"}


def test_speed_counts_what_the_kernel_itself_attends_to() -> None:
    row = WITH_PEERS[0]
    ours, triton, _, dense, _ = plots.KERNELS
    all_pairs = 4 * 64 * 4 * 1024 * 1025 / 2 / 2.0 / 1e9
    assert plots.tflops(row, ours) == pytest.approx(0.25 * all_pairs)
    assert plots.tflops(row, triton) == pytest.approx(0.1 * all_pairs)
    assert plots.tflops(row, dense) == pytest.approx(all_pairs)
    assert plots.tflops({**row, "kept_64x64": None}, triton) is None
    assert plots.tflops({**row, "fa3_paged_ms": None}, dense) is None


@pytest.mark.parametrize("rows", [WITH_PEERS, OURS_ALONE], ids=["with peers", "ours alone"])
def test_figures_are_made_from_the_json_alone(tmp_path, monkeypatch, rows) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "h100.json"
    path.write_text(json.dumps({**ORIGIN, "rows": rows, "settings": {"bf16_matmul_tflops": 798.0}}))
    for folder in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["plots", str(path), "--out", str(tmp_path / folder)])
        plots.main()
    for name in ("h100-ms.svg", "h100-tflops.svg"):
        assert "ours, paged" in (tmp_path / "one" / name).read_text()
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
