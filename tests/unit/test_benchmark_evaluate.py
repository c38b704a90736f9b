# SPDX-License-Identifier: Apache-2.0
"""What `minference-vllm eval` has found becomes a result, if something ran sparse."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import evaluate

RUN = {"gpu": "a card", "commit": "abc", "command": "python -m benchmarks.evaluate", "date": "2026-01-02"}
ROW = {"task": "needle", "tokens": 8192, "samples": 2, "dense_score": 1.0, "sparse_score": 0.5, "loss": 0.5}


def convert(report: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict[str, Any]:
    (folder / "report.json").write_text(json.dumps(report))
    options = ["evaluate", "--report", str(folder / "report.json"), "--out", str(folder / "result.json")]
    monkeypatch.setattr(evaluate.results, "describe_run", lambda *_: RUN)
    monkeypatch.setattr("sys.argv", [*options, *more])
    evaluate.main()
    return json.loads((folder / "result.json").read_text())


@pytest.fixture
def report() -> dict[str, Any]:
    more = {
        "mean": {"rows": 2, "loss": 0.5},
        "left_out": {},
        "errors": [],
        "depths": [{"depth": 0.5}],
        "positions": [],
        "prompts": [{"id": "needle/8192/0"}],
    }
    asked = {"command": "minference-vllm eval", "date": "2026-01-01", "settings": {"seed": 0}}
    return {**asked, "warnings": [], "notes": [], "rows": [ROW], **more}


def test_a_report_becomes_a_result(report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = convert(report, tmp_path, monkeypatch)
    assert found["rows"] == [ROW]
    assert (found["gpu"], found["commit"]) == ("a card", "abc")
    assert found["settings"] == {"seed": 0, "command": "minference-vllm eval", "date": "2026-01-01"}
    assert found["depths"] == [{"depth": 0.5}]
    assert found["mean"] == {"rows": 2, "loss": 0.5}
    assert "prompts" not in found


def test_what_card_and_commit_do_not_tell_is_in_the_settings(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = ["The dense server's replies are of an earlier run."]
    more = ("--note", "dense on another card", "--note", "at commit def")
    found = convert({**report, "notes": notes}, tmp_path, monkeypatch, *more)
    assert found["settings"]["notes"] == [*notes, "dense on another card", "at commit def"]


def test_a_report_of_two_dense_servers_is_no_result(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="is no result: Nothing ran sparse"):
        convert({**report, "warnings": ["Nothing ran sparse."]}, tmp_path, monkeypatch)
    assert not (tmp_path / "result.json").exists()
