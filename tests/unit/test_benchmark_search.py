# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the search: what it searches with it never compares on, and each prompt is paired with itself."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import facts, fidelity, search

TEXT = "".join(chr(0x4E00 + number) for number in range(20_000))  # no letter twice


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def test_the_second_half_holds_nothing_that_a_prompt_may_hold(text: str, tmp_path: Path) -> None:
    tokens = 1000
    path = search.second_half(text, tokens, tmp_path)
    # A prompt begins in the first half, and no token is longer than this.
    reach = len(TEXT) // 2 + tokens * facts.CHARACTERS_PER_TOKEN
    assert path.read_text() == TEXT[reach:]
    assert path.name == "text.txt.second"


class Engine:
    """In place of processes.EngineProcess; the searched file halves the divergence and the time."""

    def __init__(self, module: str, kind: str, spec: dict[str, Any]) -> None:
        self.factor = 0 if kind == "dense" else spec["factor"]

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, request: dict[str, Any]) -> dict[str, float]:
        if not self.factor:
            return {"ms": 100.0}
        losses = {"answer_loss_sparse": 2.0, "answer_loss_dense": 1.0}
        return {"kl": self.factor * request["size"], "ms": 40.0 * self.factor, **losses}


def test_both_methods_are_compared_on_the_same_prompts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    requests = {(8, "a"): [{"size": 1}, {"size": 3}], (4, "a"): [{"size": 5}], (4, "b"): [{"size": 7}]}
    monkeypatch.setattr(search, "EngineProcess", Engine)
    monkeypatch.setattr(fidelity, "make_requests", lambda *_: requests)
    specs = {search.DEFAULT: {"factor": 1.0}, search.SEARCHED: {"factor": 0.5}}
    rows = search.compare(SimpleNamespace(), specs, tmp_path)  # type: ignore[arg-type]
    found = {(row["tokens"], row["text"], row["method"]): row for row in rows}
    assert {key: (row["prompts"], row["kl"]) for key, row in found.items()} == {
        (4, "a", search.DEFAULT): (1, 5.0),
        (4, "a", search.SEARCHED): (1, 2.5),
        (4, "b", search.DEFAULT): (1, 7.0),
        (4, "b", search.SEARCHED): (1, 3.5),
        (8, "a", search.DEFAULT): (2, 2.0),
        (8, "a", search.SEARCHED): (2, 1.0),
        ("all", "all", search.DEFAULT): (4, 4.0),
        ("all", "all", search.SEARCHED): (4, 2.0),
    }
    assert [row["tokens"] for row in rows][-2:] == ["all", "all"]
    assert {row["dense_ms"] for row in rows} == {100.0}
    assert found["all", "all", search.SEARCHED]["ms"] == 20.0


def test_the_engines_of_both_methods_can_be_made_of_the_programs_options(text: str) -> None:
    options = search.parse(["--out", "x", "--model", "m", "--texts", text, "--tokens", "100"])
    specs = search.make_specs(options, {search.DEFAULT: {"name": "block"}, search.SEARCHED: {"name": "auto"}})
    engines = [spec["engine"] for spec in specs.values()]
    assert engines[0] == engines[1]
    assert engines[0]["gpu_memory_utilization"] < 1 / 3
    assert [spec["minference"]["method"]["name"] for spec in specs.values()] == ["block", "auto"]


@pytest.mark.parametrize("status", [2, 130, -9])
def test_a_search_that_fails_ends_the_benchmark(
    status: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=status, stdout=""))
    options = search.parse(["--out", "x", "--model", "m", "--texts", text, "--tokens", "100"])
    with pytest.raises(SystemExit, match=f"status {status}"):
        search.search(options, tmp_path)


@pytest.mark.parametrize("status", [0, search.NOT_BETTER])
def test_what_the_search_said_is_on_record(
    status: int, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = "On 4 other prompts KL is less."
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        calls.append(command)
        return SimpleNamespace(returncode=status, stdout=f"{said}\nIt is written.\n")

    monkeypatch.setattr(search.subprocess, "run", run)
    arguments = ["--out", "x", "--model", "m", "--texts", text, "--tokens", "100", "--search-options", "--prompts 4"]
    record = search.search(search.parse(arguments), tmp_path)
    assert record["said"] == said
    assert record["file"] == (tmp_path / "pattern.json" if status == 0 else None)
    assert calls[0][-2:] == ["--prompts", "4"]
    from minference_vllm import cli

    taken = cli.parse(calls[0][3:])
    assert (taken.model, taken.data) == ("m", [tmp_path / "text.txt.second"])
