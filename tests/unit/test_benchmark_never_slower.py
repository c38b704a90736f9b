# SPDX-License-Identifier: Apache-2.0
"""benchmarks.never_slower times every cell, judges it, and puts parts together. None starts an engine."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks import DENSE, SPARSE, never_slower, results
from benchmarks.cells import CHUNKS, PROMPTS, Cell, make_cells
from benchmarks.never_slower import LIMITS, faults_of, time_cell
from benchmarks.rounds import EXTENSION, FEWEST_JUDGED, OF_LONG
from minference_vllm.budget import Budget
from minference_vllm.config import MInferenceConfig
from minference_vllm.plan import Requests, make_plan

RUN = {"gpu": "a card", "commit": "abc", "command": "python -m it", "date": "2026-01-01"}
CONFIG = MInferenceConfig()


class Engine:
    """Stands for an engine that reads a token in so many seconds, and says when it was asked.

    After `sparse_answers` answers nothing runs sparse any more.
    """

    asked: ClassVar[list[tuple[str, int]]] = []
    sparse_answers: ClassVar[int] = 10**9
    slower: ClassVar[dict[str, float]] = {}
    each = 1e-6

    def __init__(self, module: str, kind: str, spec: dict[str, Any]) -> None:
        self.kind, self.spec = kind, spec

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, request: dict[str, int]) -> dict[str, Any]:
        self.asked.append((self.kind, request["tokens"]))
        seconds = self.each * request["tokens"] * request["prompts"] * self.slower.get(self.kind, 1.0)
        chunk = self.spec["engine"]["max_num_batched_tokens"]
        sparse = Cell(chunk, request["tokens"], request["prompts"]).goes_sparse(CONFIG)
        sparse &= sum(kind == SPARSE for kind, _ in self.asked) <= self.sparse_answers
        return {
            "seconds": seconds,
            "sparse_tokens": request["tokens"] if sparse else 0,
            "density": None,
            "redone": None,
        }


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    monkeypatch.setattr(Engine, "asked", [])
    monkeypatch.setattr(Engine, "slower", {})
    monkeypatch.setattr(Engine, "sparse_answers", 10**9)
    monkeypatch.setattr(never_slower, "EngineProcess", Engine)
    monkeypatch.setattr(results, "describe_run", lambda *_: RUN)
    return Engine


def pair(chunk: int) -> tuple[Engine, Engine]:
    spec = {"engine": {"max_num_batched_tokens": chunk}}
    return Engine("", DENSE, spec), Engine("", SPARSE, spec)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the benchmark with these arguments and gives what it wrote."""

    def main(*arguments: str, out: str = "out.json") -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["never_slower", "--out", out, *arguments])
        never_slower.main()
        written: dict[str, Any] = json.loads(Path(out).read_text())
        return written

    return main


def test_cells_are_chosen_by_pattern() -> None:
    every = make_cells(False, ["*"])
    assert len(every) == len(set(every)) == 36
    assert {cell.chunk for cell in every} == {1024, 2048, 8192, 16384}
    assert {cell.prompts for cell in every} == {1, 8, 32}
    assert (min(cell.tokens for cell in every), max(cell.tokens for cell in every)) == (2048, 65536)
    assert make_cells(False, ["2048/65536/1", "1024/*/32"]) == [
        Cell(1024, 2048, 32), Cell(1024, 16384, 32), Cell(2048, 65536, 1)
    ]  # fmt: skip
    assert make_cells(False, ["3/*"]) == []


def test_both_sides_of_the_gate_are_among_the_cells_of_each_chunk() -> None:
    for chunk in CHUNKS:
        for prompts in PROMPTS:
            cells = [cell for cell in make_cells(False, ["*"]) if (cell.chunk, cell.prompts) == (chunk, prompts)]
            assert {cell.goes_sparse(CONFIG) for cell in cells} == {False, True}


def test_several_prompts_are_cut_into_whole_chunks() -> None:
    # A chunk that ends a prompt and begins the next would be shorter than `min_chunk`, and run dense.
    cells = [cell for cell in make_cells(False, ["*"]) if cell.prompts > 1]
    assert all(cell.length % cell.chunk == 0 or cell.chunk % cell.length == 0 for cell in cells)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_end_of_a_prompt_alone_is_noticed(chunk: int) -> None:
    budget, ends = Budget(chunk, chunk), []
    for cell in make_cells(False, [f"{chunk}/*/1"]):
        last = Requests([0, cell.length % chunk or chunk], [cell.length], [True])
        ends += [part.may_end_prompt for part in make_plan(last, CONFIG, budget).chunks]
    # The last rows that smaller chunks leave of a prompt are fewer than the gate lets through.
    assert ends == [True] * (3 if chunk >= 8192 else 0)


def test_engines_take_turns_after_warming_up(engines: type[Engine]) -> None:
    row = time_cell(Cell(2048, 16384, 8), *pair(2048), CONFIG, 60.0, LIMITS)
    turns = [SPARSE, DENSE, DENSE, SPARSE]
    assert [kind for kind, _ in engines.asked] == [DENSE, SPARSE, *turns * FEWEST_JUDGED]
    assert row == {
        "chunk": 2048, "tokens": 16384, "prompts": 8, "dense_s": 0.13107, "sparse_s": 0.13107, "speedup": 1.0,
        "low": 1.0, "high": 1.0, "sparse_tokens": 16384, "density": None, "redone": None, "rounds": FEWEST_JUDGED,
        "judged": True,
    }  # fmt: skip


def test_a_row_says_whether_it_is_judged(engines: type[Engine]) -> None:
    row = time_cell(Cell(2048, 16384, 8), *pair(2048), CONFIG, 0.0, LIMITS)
    assert [row[name] for name in ("rounds", "low", "high", "judged")] == [OF_LONG, None, None, False]


def test_a_slow_cell_is_timed_again_and_judged_by_all_its_rounds(engines: type[Engine]) -> None:
    engines.slower[SPARSE] = 1.05
    row = time_cell(Cell(2048, 16384, 8), *pair(2048), CONFIG, 60.0, LIMITS)
    assert row["rounds"] == FEWEST_JUDGED + EXTENSION and row["judged"]
    assert row["speedup"] == row["low"] == row["high"] == 0.9524


def test_the_grid_takes_about_ten_minutes() -> None:
    # Seconds that an H100 takes for a cell's prompts, by their length and number, whatever the chunk.
    dense = {
        (2048, 1): 0.015, (8192, 1): 0.056, (16384, 1): 0.125, (32768, 1): 0.3, (65536, 1): 0.84, (2048, 8): 0.1,
        (16384, 8): 1.0, (2048, 32): 0.4, (16384, 32): 4.0,
    }  # fmt: skip

    def rounds(each: float) -> int:
        return OF_LONG if FEWEST_JUDGED * 4 * each > never_slower.LONG_SECONDS else FEWEST_JUDGED

    times = [dense[cell.tokens, cell.prompts] for cell in make_cells(False, ["*"])]
    assert 480 < sum((2 + 4 * rounds(each)) * each for each in times) < 540
    assert [each for each in dense.values() if rounds(each) < FEWEST_JUDGED] == [4.0]
    most = sum((2 + 4 * (rounds(each) + EXTENSION)) * each for each in times if rounds(each) == FEWEST_JUDGED)
    assert most < 15 * 60  # and the longest beside it


@pytest.mark.parametrize("sparse_answers", [0, 2])
def test_a_cell_that_is_to_run_sparse_and_does_not_ends_it_at_once(
    sparse_answers: int, engines: type[Engine], run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "sparse_answers", sparse_answers)
    with pytest.raises(SystemExit, match="1024/65536/1: nothing ran sparse, and its prompts pass the gate"):
        run("--cells", "1024/65536/1", "8192/*")
    assert sum(kind == SPARSE for kind, _ in engines.asked) == sparse_answers + 1
    assert {tokens for _, tokens in engines.asked} == {Cell(1024, 65536, 1).length}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"speedup": 0.98, "low": 0.90, "high": 0.99}, None),
        ({"speedup": 0.96, "low": 0.90, "high": 0.98}, None),
        (
            {"speedup": 0.96, "low": 0.90, "high": 0.979},
            "2048/16384/8: 0.960 times as fast as dense (0.900 to 0.979), below 0.98",
        ),
        ({"speedup": 1.01, "low": 0.89, "high": 1.2}, "2048/16384/8: it is not known whether it is slower"),
        ({"speedup": 1.0, "low": None, "high": None}, None),
        ({"sparse_tokens": 0}, "2048/16384/8: 0 tokens ran sparse"),
        ({"chunk": 512}, "512/16384/8: 5 tokens ran sparse"),
        ({"tokens": 16383}, "2048/16383/8: 5 tokens ran sparse"),
        ({"redone": 0.25}, "2048/16384/8: the guard had 25.000% of heads attend to all keys"),
    ],
)
def test_a_cell_that_is_slower_or_ran_the_wrong_way_is_a_fault(changes: dict[str, Any], fault: str | None) -> None:
    row = {"chunk": 2048, "tokens": 16384, "prompts": 8, "speedup": 1.2, "low": 1.1, "high": 1.3}
    row |= {"sparse_tokens": 5, "redone": 0.0, **changes}
    found = faults_of([row], CONFIG)
    assert len(found) == (fault is not None)
    assert fault is None or found[0].startswith(fault)


def test_all_cells_are_measured_and_written_before_a_slow_one_fails(
    engines: type[Engine], run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    engines.slower[SPARSE] = 1.1
    with pytest.raises(SystemExit, match=r"1024/2048/1: 0\.909 times as fast") as stopped:
        run("--cells", "1024/*", "8192/2048/1")
    written = json.loads((tmp_path / "out.json").read_text())
    assert len(written["rows"]) == 10 == len(str(stopped.value).splitlines())
    assert "max_num_batched_tokens" not in written["settings"]["engine"]
    assert written["settings"]["engine"]["max_num_seqs"] == 32


def test_parts_are_put_together(engines: type[Engine], run: Callable[..., dict[str, Any]]) -> None:
    one = run("--cells", "1024/*", "2048/*", out="one.json")
    two = run("--cells", "8192/*", "16384/*", out="two.json")
    whole = run("--merge", "one.json", "two.json")
    assert whole["rows"] == one["rows"] + two["rows"]
    assert (whole["gpu"], whole["command"]) == ("a card", "python -m it; python -m it")
    assert whole["settings"] == one["settings"]
    engines.slower[SPARSE] = 1.1
    with pytest.raises(SystemExit, match=r"below 0\.98"):
        run("--cells", "8192/*", "16384/*", out="two.json")
    with pytest.raises(SystemExit, match=r"below 0\.98"):
        run("--merge", "one.json", "two.json")


@pytest.mark.usefixtures("engines")
def test_parts_that_do_not_fit_are_refused(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--cells", "1024/*", out="one.json")
    with pytest.raises(SystemExit, match="lack cells: measure them too, --cells 2048/2048/1 "):
        run("--merge", "one.json")
    run(out="all.json")
    with pytest.raises(SystemExit, match="45 cells where there are 36"):
        run("--merge", "one.json", "all.json")
    assert not (tmp_path / "out.json").exists()
    monkeypatch.setattr(results, "describe_run", lambda *_: {**RUN, "gpu": "another"})
    run("--cells", "[!1]*", "16384/*", out="two.json")
    with pytest.raises(SystemExit, match=r"two\.json is no part of the same run as one\.json: they differ in gpu"):
        run("--merge", "one.json", "two.json")
    (tmp_path / "broken.json").write_text("[]")
    for name in ("broken.json", "missing.json"):
        with pytest.raises(SystemExit, match=re.escape(f"{name} is no result file")):
            run("--merge", name)
    with pytest.raises(SystemExit, match="fit none of the cells, which are 1024/2048/1 "):
        run("--cells", "512/*")
