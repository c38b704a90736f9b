# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm eval` with a third server, and the mean over tasks and lengths."""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minference_vllm import cli
from minference_vllm.cli import evaluate
from minference_vllm.cli.status import FAILED
from minference_vllm.evals import serve
from minference_vllm.evals.page import CONTROL_LEGEND
from tests.unit.evals.fake_openai import MODEL, FakeServer, Refusal, fake_server
from tests.unit.evals.runs import report, rows, run, samples

EVERY_KEY = '{"minference": {"method": {"name": "block", "local_tokens": 1048576}}}'


@pytest.fixture
def control(knows: Callable[[dict[str, Any]], str]) -> Iterator[FakeServer]:
    with fake_server("sparse", knows) as server:
        yield server


def forget(server: FakeServer, prompts: list[Any]) -> None:
    """Have the server answer these prompts wrongly."""
    knows = server.answer
    server.answer = lambda request: "no idea" if request["prompt"] in prompts else knows(request)


def test_a_control_is_compared_with_dense_as_the_sparse_server_is(
    dense: FakeServer,
    sparse: FakeServer,
    control: FakeServer,
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    needles = [sample.prompt for sample in samples(prepared) if sample.task == "needle"]
    forget(sparse, needles[:3])
    forget(control, needles[5:])
    assert run(dense, sparse, prepared, tmp_path, "--control", control.url) == 0
    found = rows(tmp_path)
    needle = found["needle"]
    assert (needle["sparse_score"], needle["lost"], needle["gained"]) == (0.5, 3, 0)
    assert (needle["control_score"], needle["control_lost"], needle["control_gained"]) == (0.83333, 1, 0)
    assert needle["control_low"] <= needle["control_loss"] <= needle["control_high"]
    assert (found["facts"]["control_score"], found["facts"]["control_loss"]) == (1, 0)
    assert report(tmp_path)["settings"]["control"]["server"] == control.url
    page = (tmp_path / "report.html").read_text()
    assert f"Control: {control.url}." in page
    assert CONTROL_LEGEND in page
    assert re.search(r"mean of 2 +.* 0.250 .* 0.083$", capsys.readouterr().out, re.MULTILINE)


def test_without_a_control_no_row_speaks_of_one(
    dense: FakeServer, sparse: FakeServer, prepared: Path, tmp_path: Path
) -> None:
    assert run(dense, sparse, prepared, tmp_path) == 0
    found = report(tmp_path)
    assert not [name for row in (*found["rows"], found["mean"]) for name in row if name.startswith("control")]
    assert "control" not in found["settings"]
    assert CONTROL_LEGEND not in (tmp_path / "report.html").read_text()


def test_the_mean_is_over_tasks_that_have_right_answers_and_each_counts_as_much(
    dense: FakeServer, sparse: FakeServer, control: FakeServer, prepared: Path, tmp_path: Path
) -> None:
    needles = [sample.prompt for sample in samples(prepared) if sample.task == "needle"]
    forget(sparse, needles[:3])
    assert run(dense, sparse, prepared, tmp_path, "--control", control.url) == 0
    mean = report(tmp_path)["mean"]
    assert mean["rows"] == 2  # needle and facts; position and agreement have no right answers
    assert (mean["dense_score"], mean["sparse_score"], mean["loss"]) == (1, 0.75, 0.25)
    assert 0 < mean["low"] < mean["loss"] < mean["high"] < 0.5
    assert (mean["lost"], mean["gained"], mean["p_value"]) == (3, 0, 0.25)
    assert (mean["equal_replies"], mean["control_equal_replies"]) == (0.5, 1)  # of needle, which is answered in text
    assert (mean["control_score"], mean["control_loss"], mean["control_lost"]) == (1, 0, 0)


def test_errors_of_the_control_are_on_record_and_in_no_score_of_the_others(
    dense: FakeServer, sparse: FakeServer, control: FakeServer, prepared: Path, tmp_path: Path
) -> None:
    def refuse(request: dict[str, Any]) -> str:
        if isinstance(request["prompt"], str) and request["prompt"].startswith("What"):
            raise Refusal("not these")
        return sparse.answer(request)

    control.answer = refuse
    assert run(dense, sparse, prepared, tmp_path, "--control", control.url) == evaluate.INCOMPLETE
    found = rows(tmp_path)["needle"]
    assert (found["samples"], found["errors"], found["loss"]) == (6, 0, 0)
    assert (found["control_score"], found["control_loss"], found["control_lost"]) == (None, None, None)
    assert {error["server"] for error in report(tmp_path)["errors"]} == {"control"}


@pytest.mark.parametrize("other", ["dense", "sparse"])
def test_a_control_that_is_one_of_the_others_is_refused(
    other: str,
    dense: FakeServer,
    sparse: FakeServer,
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = dense.url if other == "dense" else f"{sparse.url}/v1"
    assert run(dense, sparse, prepared, tmp_path, "--control", url) == FAILED
    assert f"--{other} and --control are both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--serve", "", "--control", "http://a"],
            "--control is the URL of a third server beside --dense and --sparse",
        ),
        (
            ["--dense", "http://a", "--sparse", "http://b", "--serve-control", "--additional-config '{}'"],
            "--serve-control adds to the options of --serve, which is not given.",
        ),
        (["--serve", "", "--serve-control", "--seed 1"], "--serve-control may hold --additional-config alone"),
        (["--serve", "", "--serve-control", "'"], "--serve-control is read as a shell does"),
    ],
)
def test_options_of_a_control_that_do_not_fit_are_refused(
    options: list[str], said: str, prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["eval", *options, "--model", MODEL, "--prepared", str(prepared), "--out", str(tmp_path)]
    assert cli.main(given) == FAILED
    assert said in capsys.readouterr().err


def test_a_control_that_is_started_has_its_own_settings_and_all_options_that_are_for_all(
    monkeypatch: pytest.MonkeyPatch, quick: None, dense: FakeServer, prepared: Path, tmp_path: Path
) -> None:
    started: list[tuple[list[str], str]] = []

    class Started:
        def __init__(self, arguments: Any, log: Path) -> None:
            started.append((list(arguments), log.name))
            self.server = fake_server("dense" if log.name == "dense.log" else "sparse", dense.answer)

        def __enter__(self) -> str:
            return self.server.__enter__().url

        def __exit__(self, *error: Any) -> None:
            self.server.__exit__(*error)

    monkeypatch.setattr(serve, "running", Started)
    own = f"--additional-config {shlex.quote(EVERY_KEY)}"
    options = ["--serve", "--max-model-len 64", "--serve-control", own, "--model", MODEL]
    assert cli.main(["eval", *options, "--prepared", str(prepared), "--out", str(tmp_path)]) == 0
    assert [log for _, log in started] == ["dense.log", "sparse.log", "control.log"]
    assert all("--max-model-len" in arguments for arguments, _ in started)
    assert [EVERY_KEY in arguments for arguments, _ in started] == [False, False, True]
