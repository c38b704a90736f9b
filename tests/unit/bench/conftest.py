# SPDX-License-Identifier: Apache-2.0
"""Two servers, and what sends them the load, for the tests of `minference-vllm bench`."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minference_vllm import cli
from minference_vllm.bench import compare, plots, sender
from minference_vllm.evals import serve, work
from tests.unit.bench import sender as fake_vllm
from tests.unit.evals.fake_openai import MODEL, FakeServer, fake_server

REQUESTS = 6
RUN = sender._run


@pytest.fixture
def dense() -> Iterator[FakeServer]:
    with fake_server("dense", lambda request: "text") as server:
        yield server


@pytest.fixture
def sparse() -> Iterator[FakeServer]:
    with fake_server("sparse", lambda request: "text") as server:
        yield server


class Bench:
    """The command against both servers, what it asked for, and what it wrote."""

    def __init__(self, folder: Path, dense: FakeServer, sparse: FakeServer) -> None:
        self.out, self.dense, self.sparse = folder / "out", dense, sparse
        self._asked = folder / "asked.jsonl"
        self.plan = folder / "plan.json"
        self.answer()

    def answer(self, **plan: Any) -> None:
        """Have the sender do as told: dense needs 400 ms to the first token, sparse 100."""
        ttft = {self.dense.url: 0.4, self.sparse.url: 0.1}
        self.plan.write_text(json.dumps({"ttft": ttft, "failing": {}, "asked": str(self._asked), **plan}))

    def run(self, *more: str) -> int:
        servers = ["--dense", self.dense.url, "--sparse", self.sparse.url, "--model", MODEL]
        fixed = ["--requests", str(REQUESTS), "--warmups", "2", "--out", str(self.out)]
        return cli.main(["bench", *servers, *fixed, *more])

    @property
    def asked(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._asked.read_text().splitlines()]

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.out / "report.json").read_text())


@pytest.fixture
def bench(tmp_path: Path, dense: FakeServer, sparse: FakeServer, monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench(tmp_path, dense, sparse)
    monkeypatch.setenv("FAKE_BENCH", str(made.plan))
    monkeypatch.setattr(serve, "VLLM", (sys.executable, fake_vllm.__file__))
    monkeypatch.setattr(serve, "has_vllm", lambda: True)
    # A process each would take a third of a second.
    monkeypatch.setattr(sender, "_run", lambda arguments, *_: fake_vllm.main(arguments))
    monkeypatch.setattr(compare, "RESAMPLES", 100)
    monkeypatch.setattr(work, "STILL_S", 0.0)
    monkeypatch.setattr(work, "POLL_S", 0.01)
    monkeypatch.setattr(plots, "draw", lambda report: iter(()))  # test_page.py
    return made


@pytest.fixture
def processes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender is a process, as vLLM's is."""
    monkeypatch.setattr(sender, "_run", RUN)


@pytest.fixture
def pandas(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have vLLM's reader of prompts installed."""
    monkeypatch.setattr(sender, "need", lambda module, extra: None)
