# SPDX-License-Identifier: Apache-2.0
"""The HTML report of `minference-vllm eval`: one file that shows all that the JSON report holds."""

import importlib.util
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest

from minference_vllm.evals import document, plots
from minference_vllm.evals.page import make_page

SERVER = {"model": "a/model", "server": "http://here", "vllm": ["0.33.0"]}
VOID = {"meta"}


def row(task: str, tokens: int, **other: Any) -> dict[str, Any]:
    figures = {"dense_score": 0.9, "sparse_score": 0.85, "loss": 0.05, "low": 0.01, "high": 0.09, "p_value": 0.25}
    counts = {"samples": 20, "errors": 0, "lost": 2, "gained": 0}
    sparse = {"kl": None, "density": 0.2, "recall": 0.93, "redone": 0.01, "sparse_tokens": 9, "dense_tokens": 0}
    return {"task": task, "tokens": tokens, **counts, **figures, **sparse, **other}


def make_report(**other: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("dense_score", "sparse_score", "loss", "low", "high", "density", "recall"))
    return {
        "command": "minference-vllm eval --model '<b>'",
        "date": "2026-01-01",
        "settings": {"seed": 0, "dense": SERVER, "sparse": SERVER},
        "warnings": [],
        "notes": ["Something to know: c < d."],
        "left_out": {"ruler:qa_1 at 2048 tokens": "its generator failed: a < b"},
        "errors": [{"id": "needle/8192/3", "server": "sparse", "error": "<too long>"}],
        "rows": [row("needle", 8192), row("needle", 16384, low=None, high=None), row("facts", 8192, **nothing)],
        "depths": [
            {"task": "needle", "tokens": 8192, "depth": depth, "samples": 2, "dense": 1.0, "sparse": depth}
            for depth in (0.25, 0.75)
        ],
        "positions": [
            {"task": "position", "tokens": 8192, "up_to": up_to, "dense": 2.0, "sparse": 2.1} for up_to in (4096, 8192)
        ],
        "mean": None,
        "prompts": [],
        **other,
    }


class Checker(HTMLParser):
    """Collects the text of a page, and checks that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    return checker


def test_the_page_is_whole_and_needs_no_other_file() -> None:
    found = read(make_page(make_report()))
    assert {link for link in found.links if not link.startswith(("#", "data:"))} == set()
    for shown in ("0.850", "16,384", "<too long>", "a < b", "c < d", "--model '<b>'", "a/model on vLLM 0.33.0"):
        assert shown in found.text


def test_the_mean_is_the_last_row_and_says_of_how_many() -> None:
    mean = {"rows": 12, "dense_score": 0.7, "sparse_score": 0.6875, "loss": 0.0125, "low": -0.001, "high": 0.026}
    text = make_page(make_report(mean=mean))
    rows = text.partition("</table>")[0].split("<tr>")
    assert "<td>mean of 12</td><td>-</td>" in rows[-1]
    assert "<td>0.013</td>" in rows[-1]


def prompt(number: int, **other: Any) -> dict[str, Any]:
    place = {"task": "needle", "tokens": 8192, "id": f"needle/8192/{number}", "prompt_tokens": 8100}
    return {**place, "dense": 1.0, "sparse": 0.0, "density": 0.25, "recall": None, "batch": 16, **other}


def test_the_samples_that_lost_are_listed_worst_first_and_no_more_than_fifty() -> None:
    lost = [prompt(number, sparse=number / 100) for number in range(60)]
    others = [prompt(90, sparse=1.0), prompt(91, sparse=None, dense=None), prompt(92, dense=0.5, sparse=0.75)]
    text = make_page(make_report(prompts=[*others, *reversed(lost)]))
    shown = re.findall(r"<td>needle/8192/(\d+)</td><td>1.000", text)
    assert shown == [str(number) for number in range(50)]
    assert "the 50 that lost most of 60" in text
    few = read(make_page(make_report(prompts=lost[:3]))).text
    assert "of 3" not in few
    assert "Samples that lost" not in read(make_page(make_report(prompts=others))).text


def test_a_warning_stands_before_all_figures() -> None:
    text = make_page(make_report(warnings=["Nothing ran sparse."]))
    assert 0 < text.index('<p class="warning">Nothing ran sparse.</p>') < text.index("<table")
    assert 'class="warning"' not in make_page(make_report())


def test_figures_are_drawn_of_what_there_is() -> None:
    report = make_report()
    captions = []
    for caption, svg in plots.draw(report):
        ElementTree.fromstring(svg)
        captions.append(caption)
    assert captions == [caption for _, caption, _ in plots.FIGURES]
    assert list(plots.draw(report)) == list(plots.draw(report))
    without = make_report(depths=[], positions=[])
    assert [caption for caption, _ in plots.draw(without)] == captions[:2]


def test_without_matplotlib_the_page_says_what_brings_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document.importlib.util, "find_spec", lambda name: None)
    text = make_page(make_report())
    assert "<svg" not in text
    assert "pip install 'minference-vllm[plot]'" in read(text).text
    assert importlib.util.find_spec("anything") is None  # what was patched is what the page asks
