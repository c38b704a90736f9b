# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm eval --above`: what dense attention cannot do is not asked of the sparse server."""

from dataclasses import replace
from pathlib import Path

import pytest

from minference_vllm.cli.status import FAILED
from minference_vllm.evals import prepare
from minference_vllm.evals.sample import Reply
from minference_vllm.evals.worth import worth_comparing
from tests.unit.evals.fake_openai import FakeServer
from tests.unit.evals.runs import report, rows, run, samples


@pytest.fixture
def needles(prepared: Path) -> list[str]:
    return [str(sample.prompt) for sample in samples(prepared) if sample.task == "needle"]


def find_only(server: FakeServer, known: list[str]) -> None:
    knows = server.answer
    server.answer = lambda request: knows(request) if request["prompt"] in known else "no idea"


def test_a_task_on_which_dense_scores_too_little_is_not_asked_of_the_sparse_server(
    dense: FakeServer, sparse: FakeServer, prepared: Path, needles: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    find_only(dense, needles[:1])
    assert run(dense, sparse, prepared, tmp_path, "--above", "20") == 0
    assert list(rows(tmp_path)) == ["facts", "position", "agreement"]
    assert not {request["prompt"] for request in sparse.asked if isinstance(request["prompt"], str)} & set(needles)
    why = {"needle at 64 tokens": "dense attention scores 16.7%, no more than 20%"}
    assert report(tmp_path)["left_out"] == why
    assert report(tmp_path)["settings"]["dense_above_percent"] == 20
    assert f"Left out: needle at 64 tokens ({why['needle at 64 tokens']})." in capsys.readouterr().out


def test_it_is_asked_if_dense_scores_above_that_and_later_without_the_limit(
    dense: FakeServer, sparse: FakeServer, prepared: Path, needles: list[str], tmp_path: Path
) -> None:
    find_only(dense, needles[:1])
    assert run(dense, sparse, prepared, tmp_path / "above", "--above", "16") == 0
    assert rows(tmp_path / "above")["needle"]["dense_score"] == pytest.approx(1 / 6, abs=1e-5)
    assert run(dense, sparse, prepared, tmp_path / "twice", "--above", "20") == 0
    asked = len(dense.asked)
    assert run(dense, sparse, prepared, tmp_path / "twice") == 0
    assert list(rows(tmp_path / "twice")) == ["needle", "facts", "position", "agreement"]
    assert len(dense.asked) == asked


def test_replies_that_are_errors_do_not_count(prepared: Path) -> None:
    whole = prepare.load(prepared)
    needle, facts = (next(sample for sample in whole.samples if sample.task == task) for task in ("needle", "facts"))
    two = replace(whole, samples=[needle, facts])
    replies = {needle.id: Reply(id=needle.id, error="not now"), facts.id: Reply(id=facts.id, first_choices=(1.0, 0.0))}
    assert worth_comparing(two, replies, 20).samples == [needle, facts]
    assert worth_comparing(two, replies, 50).samples == [needle]


def test_nothing_left_to_compare_is_said(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, folder = prepare.load(prepared), tmp_path / "needles"
    prepare.save(folder, whole.header, [sample for sample in whole.samples if sample.task == "needle"])
    find_only(dense, [])
    assert run(dense, sparse, folder, tmp_path / "out", "--above", "0") == FAILED
    assert "Dense attention scores no more than 0% on any task" in capsys.readouterr().err
    assert not sparse.asked
