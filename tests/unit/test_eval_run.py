# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm eval` against servers that say what a test wants: what it writes, goes on with, and refuses."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minference_vllm import cli
from minference_vllm.cli import evaluate
from minference_vllm.cli.status import FAILED
from minference_vllm.evals import client, plots, prepare, work
from minference_vllm.evals.client import Client
from minference_vllm.evals.prepare import Header, Settings
from minference_vllm.evals.sample import Kind, Reply, Sample
from tests.unit.fake_openai import DENSITY, MODEL, RECALL, VERSION, FakeServer, Refusal, fake_server

SAMPLES = 6
SETTINGS = Settings(
    tokenizer="none",
    tasks=("needle", "facts", "position", "agreement"),
    tokens=(64,),
    samples=SAMPLES,
    seed=0,
    chat=False,
    text=None,
    prompts=None,
    ruler=None,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake server's metrics are never behind; figures take most of a second."""
    monkeypatch.setattr(work, "STILL_S", 0.0)
    monkeypatch.setattr(work, "POLL_S", 0.01)
    monkeypatch.setattr(plots, "draw", lambda report: iter(()))  # test_eval_page.py


def make_samples() -> Iterator[Sample]:
    """Of each kind that is asked for in another way."""
    tokens = tuple(range(40))
    for index in range(SAMPLES):
        place = {"tokens": 64, "index": index}
        text = f"What is hidden in number {index}?"
        yield Sample(
            task="needle", kind=Kind.ALL, prompt=text, max_tokens=4, references=(f"{index}!",), depth=index / 6, **place
        )
        yield Sample(task="facts", kind=Kind.FIRST_CHOICE, prompt=tokens, max_tokens=1, answers=(7, 9), **place)
        yield Sample(task="position", kind=Kind.LOGPROB, prompt=tokens, max_tokens=1, **place)
        yield Sample(task="agreement", kind=Kind.AGREEMENT, prompt=f"Go on, {index}.", max_tokens=4, **place)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    by_task = sorted(make_samples(), key=lambda sample: SETTINGS.tasks.index(sample.task))
    prepare.save(folder, Header(settings=SETTINGS, left_out={}), by_task)
    return folder


def samples(folder: Path) -> list[Sample]:
    return prepare.load(folder).samples


@pytest.fixture
def knows(prepared: Path) -> Callable[[dict[str, Any]], str]:
    """Answers every question right."""
    answers = {sample.prompt: " ".join(sample.references) for sample in samples(prepared)}
    return lambda request: answers.get(request["prompt"], "") if isinstance(request["prompt"], str) else ""


@pytest.fixture
def dense(knows: Callable[[dict[str, Any]], str]) -> Iterator[FakeServer]:
    with fake_server("dense", knows) as server:
        yield server


@pytest.fixture
def sparse(knows: Callable[[dict[str, Any]], str]) -> Iterator[FakeServer]:
    with fake_server("sparse", knows) as server:
        yield server


def run(dense: FakeServer, sparse: FakeServer, prepared: Path, out: Path, *more: str) -> int:
    servers = ["--dense", dense.url, "--sparse", f"{sparse.url}/v1/", "--model", MODEL]
    return cli.main(["eval", *servers, "--prepared", str(prepared), "--out", str(out), *more])


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["task"]: row for row in report(out)["rows"]}


# What is written


def test_servers_that_say_the_same_lose_nothing(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(dense, sparse, prepared, tmp_path) == 0
    found = rows(tmp_path)
    assert {task: (row["dense_score"], row["sparse_score"]) for task, row in found.items()} == {
        "needle": (1, 1), "facts": (1, 1), "position": (-1, -1), "agreement": (1, 1),
    }  # fmt: skip
    assert {(row["loss"], row["low"], row["high"], row["density"], row["recall"]) for row in found.values()} == {
        (0, 0, 0, DENSITY, RECALL)
    }
    assert {row["samples"] for row in found.values()} == {SAMPLES}
    assert found["needle"]["redone"] == 0.5
    assert report(tmp_path)["settings"]["sparse"]["vllm"] == [VERSION]
    assert report(tmp_path)["warnings"] == []
    assert str(tmp_path / "report.html") in capsys.readouterr().out


def test_what_sparse_loses_is_in_its_rows(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path
) -> None:
    needles = [sample.prompt for sample in samples(prepared) if sample.task == "needle"]
    knows = sparse.answer
    sparse.answer = lambda request: "no idea" if request["prompt"] in needles[:2] else knows(request)
    sparse.logprob, sparse.step_tokens, sparse.step_logprob = -2.0, (1, 2, 7, 4), -1.0
    assert run(dense, sparse, prepared, tmp_path) == 0
    found = rows(tmp_path)
    needle = found["needle"]
    assert (needle["sparse_score"], needle["lost"], needle["gained"]) == (0.66667, 2, 0)
    assert needle["low"] < needle["loss"] < needle["high"]
    assert needle["p_value"] == 0.5  # two lost of two that changed
    assert (found["facts"]["sparse_score"], found["facts"]["loss"]) == (0, 1)
    assert (found["position"]["sparse_score"], found["position"]["loss"]) == (-2, 1)
    assert (found["agreement"]["sparse_score"], found["agreement"]["p_value"]) == (0.5, None)
    # Two tokens of probabilities e^-.5 and e^-1.5 in dense, of e^-1 and e^-1.5 in sparse; of the third both list one.
    rests = 1 - math.exp(-0.5) - math.exp(-1.5), 1 - math.exp(-1) - math.exp(-1.5)
    kl = math.exp(-0.5) * 0.5 + rests[0] * math.log(rests[0] / rests[1])
    assert found["agreement"]["kl"] == pytest.approx(2 / 3 * kl, abs=1e-5)
    assert {cell["sparse"] for cell in report(tmp_path)["depths"] if cell["task"] == "needle"} == {0.0, 1.0}
    assert {point["sparse"] - point["dense"] for point in report(tmp_path)["positions"]} == {1.0}


def test_both_servers_are_asked_the_same_greedily_and_reuse_no_pages(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path
) -> None:
    assert run(dense, sparse, prepared, tmp_path) == 0

    def asked(server: FakeServer) -> list[str]:
        return sorted(json.dumps({k: v for k, v in request.items() if k != "cache_salt"}) for request in server.asked)

    assert asked(dense) == asked(sparse)
    assert len(dense.asked) == len(samples(prepared))
    assert {request["temperature"] for request in dense.asked} == {0}
    assert len({request["cache_salt"] for request in dense.asked}) == len(dense.asked)


def test_one_request_at_a_time_gives_each_prompt_its_density(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path
) -> None:
    assert run(dense, sparse, prepared, tmp_path, "--concurrency", "1") == 0
    assert {(prompt["density"], prompt["recall"]) for prompt in report(tmp_path)["prompts"]} == {(DENSITY, RECALL)}


# Proof that the sparse path ran


@pytest.mark.parametrize("path", ["dense", None], ids=["all tokens dense", "no metrics"])
def test_a_sparse_server_that_runs_dense_is_no_success(
    path: str | None, dense: FakeServer, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server(path, dense.answer) as sparse:
        assert run(dense, sparse, prepared, tmp_path) == evaluate.NOT_SPARSE
    assert "No prompt token ran sparse" in report(tmp_path)["warnings"][0]
    assert '<p class="warning">No prompt token ran sparse' in (tmp_path / "report.html").read_text()
    assert "WARNING: No prompt token ran sparse" in capsys.readouterr().out


def test_a_dense_server_that_ran_sparse_is_refused(
    sparse: FakeServer, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server("sparse", sparse.answer) as dense:
        dense.count({"prompt": "earlier"})
        assert run(dense, sparse, prepared, tmp_path) == FAILED
        assert "7 prompt tokens ran sparse on it" in capsys.readouterr().err
        assert len(dense.asked) == 1  # nothing of ours


def test_a_dense_server_that_begins_to_run_sparse_is_refused(
    sparse: FakeServer, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with fake_server("sparse", sparse.answer) as dense:
        assert run(dense, sparse, prepared, tmp_path) == FAILED
    assert "is to be the dense server" in capsys.readouterr().err


def test_one_server_is_not_two(dense: FakeServer, prepared: Path, tmp_path: Path) -> None:
    servers = ["--dense", dense.url, "--sparse", f"{dense.url}/", "--model", MODEL]
    assert cli.main(["eval", *servers, "--prepared", str(prepared), "--out", str(tmp_path)]) == FAILED


# Errors


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
