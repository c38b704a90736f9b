# SPDX-License-Identifier: Apache-2.0
"""The HTML report of `minference-vllm bench`."""

from typing import Any
from xml.etree import ElementTree

import pytest

from minference_vllm.bench import page, plots
from minference_vllm.bench.compare import METRICS, PERCENTILES
from tests.unit.evals.test_page import SERVER, read

FAILED = {"server": "sparse", "request": 3, "error": "<gone>"}


def place(input_len: int | None, load: str) -> dict[str, Any]:
    return {"input_len": input_len, "output_len": 128 if input_len else None, "load": load}


def make_report(*points: dict[str, Any], **other: Any) -> dict[str, Any]:
    medians = {"ttft_dense": 400.0, "ttft_sparse": 100.0, "ttft_speedup": 4.0, "ttft_low": 3.5, "ttft_high": 4.5}
    ratios = {"itl_speedup": 1.0, "tpot_speedup": 1.0, "e2e_speedup": 2.0, "throughput": 1.9}
    work = {"sparse_share": 1.0, "density": 0.2, "recall": None}
    counts = {"requests": 50, "dense_failed": 0, "sparse_failed": 1}
    speedup = {"dense": 400.0, "sparse": 100.0, "speedup": 4.0, "low": 3.5, "high": 4.5}
    return {
        "command": "minference-vllm bench --model '<b>'",
        "date": "2026-01-01",
        "settings": {"seed": 0, "dense": SERVER, "sparse": SERVER},
        "warnings": [],
        "notes": ["Something to know: a < b."],
        "errors": [{**place(8192, "4 in flight"), **FAILED}],
        "rows": [
            {"rate": None, "concurrency": None, **counts, **medians, **ratios, **work, **point} for point in points
        ],
        "latencies": [
            {**point, "metric": metric, "percentile": percentile, **speedup}
            for point in points
            for metric in METRICS
            for percentile in PERCENTILES
        ],
        "rates": [
            {**point, "rate": "requests a second", "dense": 1.0, "sparse": 1.9, "ratio": 1.9} for point in points
        ],
        "distributions": [{**point, "dense": [300.0, 500.0], "sparse": [90.0, 110.0]} for point in points],
        **other,
    }


ONE = place(8192, "4 in flight") | {"concurrency": 4}
SWEEP = [place(tokens, f"{rate:g} a second") | {"rate": rate} for tokens in (8192, 32768) for rate in (0.5, 2.0)] + [
    place(8192, f"{count} in flight") | {"concurrency": count} for count in (1, 4)
]


def test_the_page_is_whole_and_needs_no_other_file() -> None:
    found = read(page.make_page(make_report(*SWEEP)))
    assert {link for link in found.links if not link.startswith(("#", "data:"))} == set()
    for shown in ("400.000", "32,768", "0.5 a second", "<gone>", "a < b", "--model '<b>'", "a/model on vLLM 0.33.0"):
        assert shown in found.text
    for title in METRICS.values():
        assert title in found.text.lower()


def test_figures_are_drawn_of_what_there_is() -> None:
    def captions(*points: dict[str, Any]) -> list[str]:
        drawn = list(plots.draw(make_report(*points)))
        for _, svg in drawn:
            ElementTree.fromstring(svg)
        return [caption for caption, _ in drawn]

    every = [caption for _, caption, _ in plots.FIGURES]
    assert captions(*SWEEP) == every
    assert captions(ONE) == every[:2]
    assert captions(place(None, "1 in flight") | {"concurrency": 1}) == every[:2]


def test_a_point_that_nothing_is_known_of_is_shown_and_not_drawn() -> None:
    nothing = dict.fromkeys(("ttft_dense", "ttft_sparse", "ttft_speedup", "ttft_low", "ttft_high", "density"))
    report = make_report(ONE | nothing, latencies=[], distributions=[])
    assert list(plots.draw(report)) == []
    assert "4 in flight" in read(page.make_page(report)).text


@pytest.mark.parametrize(
    ("row", "name"),
    [(ONE, "8,192 read, 128 written, 4 in flight"), (place(None, "2 a second"), "2 a second")],
)
def test_a_point_is_named_by_what_is_known_of_it(row: dict[str, Any], name: str) -> None:
    assert plots._name(row) == name
