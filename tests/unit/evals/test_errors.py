# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm eval` where something goes wrong: errors are on record, and a run goes on where it was cut off."""

import re
from pathlib import Path
from typing import Any

import pytest

from minference_vllm import cli
from minference_vllm.cli import evaluate
from minference_vllm.cli.status import FAILED
from minference_vllm.evals import client
from minference_vllm.evals.client import Client
from minference_vllm.evals.sample import Reply, Sample
from tests.unit.evals.fake_openai import MODEL, FakeServer, Refusal, fake_server
from tests.unit.evals.runs import SAMPLES, report, rows, run, samples


def test_errors_are_on_record_and_in_no_score(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needles = [sample.prompt for sample in samples(prepared) if sample.task == "needle"]
    knows = sparse.answer

    def refuse(request: dict[str, Any]) -> str:
        if request["prompt"] == needles[0]:
            raise Refusal("this prompt is too long")
        return knows(request)

    sparse.answer = refuse
    assert run(dense, sparse, prepared, tmp_path) == evaluate.INCOMPLETE
    needle = rows(tmp_path)["needle"]
    assert (needle["samples"], needle["errors"], needle["sparse_score"]) == (SAMPLES - 1, 1, 1)
    (error,) = report(tmp_path)["errors"]
    assert (error["id"], error["server"]) == ("needle/64/0", "sparse")
    assert "this prompt is too long" in error["error"]
    assert "this prompt is too long" in capsys.readouterr().out
    assert "this prompt is too long" in (tmp_path / "report.html").read_text()

    # The same command asks for what is missing, and for nothing else.
    sparse.answer = knows
    before = len(sparse.asked), len(dense.asked)
    assert run(dense, sparse, prepared, tmp_path) == 0
    assert (len(sparse.asked), len(dense.asked)) == (before[0] + 1, before[1])
    assert rows(tmp_path)["needle"]["samples"] == SAMPLES


def test_a_task_of_which_nothing_is_answered_has_no_score(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path
) -> None:
    def refuse(request: dict[str, Any]) -> str:
        if "logprobs" in request:
            raise Refusal("no")
        return dense.answer(request)

    sparse.answer = refuse
    assert run(dense, sparse, prepared, tmp_path) == evaluate.INCOMPLETE
    row = rows(tmp_path)["agreement"]
    assert (row["samples"], row["errors"], row["sparse_score"], row["loss"]) == (0, SAMPLES, None, None)


def test_what_is_no_number_is_an_error(dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path) -> None:
    sparse.logprob = float("nan")
    assert run(dense, sparse, prepared, tmp_path) == evaluate.INCOMPLETE
    found = rows(tmp_path)
    assert (found["position"]["samples"], found["position"]["errors"]) == (0, SAMPLES)
    assert "finite number" in report(tmp_path)["errors"][-1]["error"]
    assert run(dense, sparse, prepared, tmp_path) == evaluate.INCOMPLETE  # what was written can be read


def test_a_server_that_gives_errors_only_ends_the_run(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: dict[str, Any]) -> str:
        raise Refusal("no such option")

    dense.answer = refuse
    assert run(dense, sparse, prepared, tmp_path) == FAILED
    assert "gave errors only, to 18 prompts" in capsys.readouterr().err  # three batches of six
    assert not (tmp_path / "report.json").exists()


def test_a_server_that_goes_away_ends_the_run(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(client, "RETRIES", 0)

    def leave(_: dict[str, Any]) -> str:
        raise ConnectionError

    sparse.answer = leave
    assert run(dense, sparse, prepared, tmp_path) == FAILED
    assert "goes on where it was" in capsys.readouterr().err


def test_a_server_without_the_model_is_refused(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = ["--dense", dense.url, "--sparse", sparse.url, "--model", "another"]
    assert cli.main(["eval", *servers, "--prepared", str(prepared), "--out", str(tmp_path)]) == FAILED
    assert f"serves {MODEL}, not another" in capsys.readouterr().err


# Going on


def test_replies_of_an_earlier_run_are_said_to_be_that(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at(date: str) -> None:
        monkeypatch.setattr("minference_vllm.evals.answers.now", lambda: date)
        monkeypatch.setattr("minference_vllm.cli.servers.now", lambda: date)

    at("2026-01-01T00:00:00+00:00")
    assert run(dense, sparse, prepared, tmp_path) == 0
    assert [note for note in report(tmp_path)["notes"] if "earlier run" in note] == []
    old = (tmp_path / "dense.jsonl").read_text()
    (tmp_path / "sparse.jsonl").unlink()
    at("2026-01-02T00:00:00+00:00")
    assert run(dense, sparse, prepared, tmp_path) == 0
    settings, (note,) = report(tmp_path)["settings"], report(tmp_path)["notes"][1:]
    assert note.startswith(
        "The dense server's replies to 24 of 24 samples are of an earlier run, of 2026-01-01T00:00:00"
    )
    assert settings["dense"]["replied"] == ["2026-01-01T00:00:00+00:00"] * 2
    assert settings["sparse"]["replied"] == ["2026-01-02T00:00:00+00:00"] * 2
    # A file of a version that noted no dates.
    (tmp_path / "dense.jsonl").write_text(re.sub(r',"date":"[^"]*"', "", old))
    assert run(dense, sparse, prepared, tmp_path) == 0
    assert "24 of 24 samples are of an earlier run, of an unknown date" in report(tmp_path)["notes"][1]
    assert report(tmp_path)["settings"]["dense"]["replied"] is None


class Cut(Exception):
    """The end of a run that a test cuts off."""


def test_a_run_that_was_cut_off_goes_on_where_it_stopped(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply, replies = Client.reply, iter(range(10))

    def cut(self: Client, sample: Sample) -> Reply:
        if next(replies, None) is None:
            raise Cut
        return reply(self, sample)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(Client, "reply", cut)
        run(dense, sparse, prepared, tmp_path, "--concurrency", "1")
    with (tmp_path / "dense.jsonl").open("a") as file:
        file.write('{"task":"needle","tok')  # as a machine that lost its power leaves it
    assert len(dense.asked) == 10
    assert run(dense, sparse, prepared, tmp_path) == 0
    assert len(dense.asked) == len(sparse.asked) == len(samples(prepared))
    assert sum(row["samples"] for row in report(tmp_path)["rows"]) == len(samples(prepared))


def test_replies_of_another_server_are_not_gone_on_with(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(dense, sparse, prepared, tmp_path) == 0
    with fake_server("dense", dense.answer) as other:
        assert run(other, sparse, prepared, tmp_path) == FAILED
        assert f"server was '{dense.url}' and is now '{other.url}'" in capsys.readouterr().err
