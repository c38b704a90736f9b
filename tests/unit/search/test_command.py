# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm search`: what does not fit is said before an engine starts, and what is worse is never written."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minference_vllm.cli import main
from minference_vllm.cli import search as command
from minference_vllm.patterns import Geometry, read_pattern
from minference_vllm.patterns.file import PatternFile, parse_pattern
from minference_vllm.search import prompts, reader, run
from minference_vllm.search.run import Found
from minference_vllm.search.verdict import Verdict
from tests.unit.test_patterns import content

BETTER = Verdict([0.2, 0.3], [0.1, 0.15], 10.0, 10.0, "ms")
FILE: PatternFile = parse_pattern(
    json.dumps(content(method={"name": "block"}, layers=[[0.5, 0.75, 0.84, 0.96], "dense"])), "x"
)


def search(tmp_path: Path, *given: str) -> int:
    text = tmp_path / "text.txt"
    text.write_text("A text.")
    return main(["search", "org/Model", "--data", str(text), "--out", str(tmp_path / "out.json"), *given])


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "this machine has none: --cost pairs counts what they attend to"),
        (("--engine", "["), "--engine is not valid JSON"),
        (("--engine", "7"), "--engine must be a JSON object, and is int"),
        (("--out", "/dev/null/x"), "/dev/null/x cannot be written"),
        (("--prompts", "1"), "is no whole number from 2 to 1000"),
        (("--methods", "dense"), "invalid choice: 'dense'"),
    ],
)
def test_what_does_not_fit_is_said_before_an_engine_starts(
    given: tuple[str, ...],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        status = search(tmp_path, *given)
    except SystemExit as ended:
        status = int(ended.code or 0)
    assert status == 2
    assert said in capsys.readouterr().err


def test_a_name_that_no_file_holds_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", "m" * 300, "--data", "x", "--out", str(tmp_path / "x")]) == 2
    assert "longer than the 256 letters" in capsys.readouterr().err


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> list[Verdict]:
    """Searches that are over at once, each with the last of these verdicts."""
    found: list[Verdict] = []

    class Over:
        num_steps = 3

        def __init__(self, *arguments: Any) -> None:
            assert arguments[-1] == 0, "pairs are counted"

        def run(self, name: str, provenance: Any, journal: Any, say: Any) -> Found:
            say("all of it")
            return Found(FILE.model_copy(update={"models": (name,), "provenance": provenance}), found[-1])

    monkeypatch.setattr(prompts, "make", lambda *_: None)
    monkeypatch.setattr(reader, "Reader", lambda *_: None)
    monkeypatch.setattr(run, "Search", Over)
    return found


def test_a_better_file_is_written_and_can_be_served(
    verdicts: list[Verdict], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts.append(BETTER)
    monkeypatch.setattr(sys, "argv", ["minference-vllm", "search", "a model"])
    assert search(tmp_path, "--cost", "pairs") == 0
    file = read_pattern(tmp_path / "out.json")
    assert file.models == ("org/Model",)
    assert file.geometry == Geometry(num_layers=2, num_qo_heads=4, num_kv_heads=2, head_dim=64)
    assert file.provenance.notes[0] == "minference-vllm search 'a model'"
    assert "org/Model, minference-vllm 0." in file.provenance.notes[1]
    said = capsys.readouterr().out
    assert BETTER.sentence() in said
    assert f'"pattern_file": "{tmp_path / "out.json"}"' in said
    assert (tmp_path / "out.json.jsonl").exists()
    assert main(["patterns", "show", str(tmp_path / "out.json")]) == 0
    assert "2 layers, 1 of them dense; heads: 1 of share 0.5, 1 of share 0.75" in capsys.readouterr().out


@pytest.mark.parametrize("worse", [replace(BETTER, file_kl=[0.2, 0.4]), replace(BETTER, file_cost=11.0)])
def test_what_is_no_better_is_not_written(
    worse: Verdict, verdicts: list[Verdict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts.append(worse)
    assert search(tmp_path, "--cost", "pairs") == command.NOT_BETTER
    assert not (tmp_path / "out.json").exists()
    assert "nothing is written" in capsys.readouterr().out


def test_a_search_with_other_settings_does_not_go_on(
    verdicts: list[Verdict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts.append(BETTER)
    assert search(tmp_path, "--cost", "pairs") == 0
    assert search(tmp_path, "--cost", "pairs", "--chunk", "512") == 2
    assert "was made with other settings: engine was" in capsys.readouterr().err
