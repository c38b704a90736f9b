# SPDX-License-Identifier: Apache-2.0
"""How benchmarks.faults breaks the first launch of the kernels, in the dry run at a server's start, and judges that."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import results
from benchmarks.faults import __main__ as faults
from benchmarks.faults import injection
from benchmarks.faults.cases import CASES, Outcome
from benchmarks.faults.injection import VARIABLE, Fault, Injection
from benchmarks.faults.promises import broken
from benchmarks.faults.server import Trial
from benchmarks.faults.trial import Finding, broken_ranks
from minference_vllm import ops
from minference_vllm.config import MInferenceConfig
from minference_vllm.evals import serve
from minference_vllm.runtime import Runtime
from minference_vllm.scratch import ScratchShape

CASE = CASES["no launch at start"]
GOOD = Finding(
    Outcome.GOES_ON, fired=1, before_equal=True, during_status=200, during_equal=True, after_equal=True,
    sparse_tokens_before=0, sparse_tokens_after=0, fault_tokens=9, says_so=True, broken_ranks=1,
)  # fmt: skip


def test_a_shell_that_wants_warnings_only_still_gets_the_lines_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    started: list[dict[str, str]] = []

    @contextmanager
    def start(arguments: list[str], log: Path, environ: dict[str, str]) -> Iterator[None]:
        started.append(environ)
        yield None

    monkeypatch.setattr(serve, "started", start)
    with Trial("model", "", CASE, is_dense=False, folder=tmp_path / "t").running():
        pass
    assert [environ["VLLM_LOGGING_LEVEL"] for environ in started] == ["INFO"]


@pytest.fixture
def injected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Injection]:
    monkeypatch.setattr(ops, "attend", ops.attend)
    given = Injection(Fault.NO_LAUNCH, is_dense=False, folder=tmp_path / "plugin")
    monkeypatch.setenv(VARIABLE, given.environ()[VARIABLE])
    injection.install()
    yield given


def test_the_dry_run_meets_the_fault_and_all_runs_dense(injected: Injection, caplog: pytest.LogCaptureFixture) -> None:
    runtime = Runtime(MInferenceConfig(log_every=0, method={"name": "block"}), torch.device("cpu"), publish=False)
    shape = ScratchShape(2, 1, 64, torch.float32, 512, 512)
    with pytest.raises(RuntimeError, match=injection.SAID) as raised:  # what a GPU's warm_up catches
        runtime.dry_run(shape, page_size=16)
    runtime.faults.in_start(raised.value)
    assert runtime.is_broken and CASE.said in caplog.text
    assert injected.fired == CASE.times


def test_a_server_that_goes_on_dense_does_as_promised() -> None:
    assert (CASE.stock, CASE.ours) == (None, Outcome.GOES_ON)
    assert broken(CASE, False, GOOD, None) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"outcome": Outcome.ENDS}, "the server ends, and is to: goes on"),
        ({"fired": 0}, "the fault never came"),
        ({"fired": 4}, "came 4 times, and is to come 1 times"),
        ({"before_equal": False}, "before the fault"),
        ({"during_equal": False}, "while the fault lasted"),
        ({"after_equal": False}, "after the fault"),
        ({"sparse_tokens_before": 5}, "5 tokens ran sparse, and none were to"),
        ({"sparse_tokens_after": 5}, "5 tokens ran sparse after the fault"),
        ({"fault_tokens": 0}, "sparse_fault"),
        ({"says_so": False}, "its log does not say"),
        ({"broken_ranks": 0}, "minference_broken_ranks is 0, and is to be 1"),
        ({"broken_ranks": None}, "minference_broken_ranks is None, and is to be 1"),
    ],
)
def test_each_promise_can_be_broken(changes: dict[str, Any], said: str) -> None:
    found = broken(CASE, False, replace(GOOD, **changes), None)
    assert len(found) == 1 and said in found[0]


def test_a_path_that_is_to_go_on_must_not_be_given_up() -> None:
    found = replace(GOOD, sparse_tokens_before=9, sparse_tokens_after=9)
    [fault] = broken(CASES["a kernel raises once"], False, found, None)
    assert fault == "minference_broken_ranks is 1, and its sparse path is to go on"


def test_broken_ranks_are_read_from_metrics() -> None:
    page = '# TYPE minference_broken_ranks gauge\nminference_broken_ranks 1.0\nother_total{a="b"} 3.0\n'
    assert broken_ranks(page) == 1
    assert broken_ranks(page.replace("ranks 1.0", "ranks 0.0")) == 0
    assert broken_ranks("") is None


@pytest.mark.parametrize("more", [[], ["no folder for metrics"]])
def test_without_a_gpu_there_is_nothing_to_break(
    more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(results, "describe_run", lambda *_: {})
    monkeypatch.setattr(faults, "run_all", lambda options, *_: ran.append(options.cases) or [])
    monkeypatch.setattr(
        "sys.argv", ["faults", "--model", "m", "--cases", "no launch at start", *more, "--out", "o.json"]
    )
    if more:
        assert faults.main() == 0
    else:
        with pytest.raises(SystemExit, match="Nothing is measured: each of these cases needs a GPU"):
            faults.main()
    assert ran == [more] * bool(more)
    assert "no launch at start: left out, there is no GPU" in capsys.readouterr().out
