# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm eval --prepare`: a folder has whole samples of its settings, or none."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minference_vllm import cli
from minference_vllm.cli.status import FAILED
from minference_vllm.evals import prepare, tasks
from minference_vllm.evals.material import Material
from minference_vllm.evals.sample import POSITIONS, Kind, Sample
from minference_vllm.evals.tasks import ruler
from tests.unit.evals.runs import SENTENCE


@pytest.mark.parametrize("tokens", ["10", "16", "20", "32"])
def test_a_length_without_room_for_all_parts_of_a_passage_is_refused_before_anything_is_written(
    tokens: str, prepare_with: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    position = ("--tasks", "position", "--text", str(tmp_path / "text.txt"), "--tokens")
    assert prepare_with(*position, tokens) == FAILED
    assert f"The task position does not fit into {tokens} tokens: ask for more" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
    assert prepare_with(*position, "33") == 0
    assert {len(sample.prompt) for sample in prepare.load(tmp_path / "made").samples} == {POSITIONS + 1}


def test_samples_that_cannot_be_scored_are_not_written(
    prepare_with: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def make(material: Material, tokens: int, samples: int) -> list[Sample]:
        return [Sample(task="retrieval", tokens=tokens, index=0, kind=Kind.ALL, prompt="a", max_tokens=1)]

    monkeypatch.setitem(tasks.MAKERS, "retrieval", make)
    assert prepare_with("--tasks", "retrieval", "--tokens", "64") == FAILED
    said = "A sample was made that cannot be scored, retrieval/64/0: references: an answer in text needs some"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_what_is_lacking_is_left_out_unless_it_was_asked_for(
    prepare_with: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ruler, "is_installed", lambda: False)
    assert prepare_with("--tokens", "1024", "--samples", "2") == 0
    found = prepare.load(tmp_path / "made")
    assert found.header.settings.tasks == ("retrieval",)
    assert re.fullmatch(r"tokenizer\d+ [0-9a-f]{16}", found.header.settings.tokenizer)  # no path
    assert found.header.left_out["needle"] == "needs a text: --text FILE"
    assert "pip install 'minference-vllm[ruler]'" in found.header.left_out["ruler:vt"]
    assert "Left out: agreement (needs your prompts: --prompts FILE)." in capsys.readouterr().out
    assert prepare_with("--tasks", "needle") == FAILED
    assert "The task needle needs a text" in capsys.readouterr().err


def test_samples_of_other_settings_are_not_used(
    prepare_with: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = ("--tasks", "needle", "--text", str(tmp_path / "text.txt"), "--samples", "2", "--tokens")
    assert prepare_with(*same, "1024") == 0
    assert prepare_with(*same, "1024") == 0
    assert prepare_with(*same, "2048") == FAILED
    assert "tokens was [1024] and is now [2048]" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text(SENTENCE * 500)
    assert prepare_with(*same, "1024") == FAILED
    assert "text was " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        pytest.param(["--dense", "http://a"], "--dense and --sparse, or --serve, or --prepare", id="one server"),
        pytest.param(["--serve", "", "--prepare", "x", "--model", "m"], "or --prepare", id="two ways"),
        pytest.param(["--serve", "", "--model", "m"], "Give --out", id="no folder"),
        pytest.param(["--serve", "", "--out", "x"], "Give --model", id="no model"),
        pytest.param(
            ["--serve", "", "--model", "m", "--out", "x", "--prepared", "y", "--seed", "1"],
            "leave out --seed",
            id="prepared samples have their settings",
        ),
        pytest.param(["--prepare", "x", "--model", "m", "--tasks", "vt"], "There is no task 'vt'", id="no such task"),
        pytest.param(["--prepare", "x", "--tokenizer", "/nowhere"], "Name one: --tokenizer", id="no tokenizer"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: list[str], fault: str, capsys: Any) -> None:
    assert cli.main(["eval", *options]) == FAILED
    assert fault in capsys.readouterr().err
