# SPDX-License-Identifier: Apache-2.0
"""How benchmarks.ttft asks two engines in turns, and what it makes of their times. None starts an engine."""

import json
import sys
from contextlib import nullcontext

import pytest

from benchmarks import parse_method, resolved, results, ttft
from benchmarks.processes import EngineProcess, on_gpus


@pytest.mark.parametrize(
    ("tokens", "requests"), [(8192, 48), (16384, 12), (32768, 3), (65536, 2), (131072, 2), (7, 48)]
)
def test_long_prompts_are_timed_less_often(tokens, requests):
    assert ttft.num_timed(tokens, 3) == requests


def test_ttft_rows_hold_medians():
    found = {
        "dense": [1.0, 9.0, 2.0],
        "sparse": [0.5, 1.0, 4.0],
        "sparse_tokens": 8,
        "density": 0.25,
        "redone": 0.0,
    }
    assert ttft.make_row("30:200", 4, 8, found) == {
        "tokens": 8, "method": "30:200", "layers": 4, "dense_ttft_s": 2.0, "sparse_ttft_s": 1.0,
        "speedup": 2.0, "sparse_tokens": 8, "density": 0.25, "redone": 0.0, "timed_requests": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("block", {"name": "block"}),
        ('block:{"share": 0.95}', {"name": "block", "share": 0.95}),
        ("512:2048", {"name": "vertical_slash", "vertical_size": 512, "slash_size": 2048}),
        ('vertical_slash:{"probe_rows": "spread"}', {"name": "vertical_slash", "probe_rows": "spread"}),
        ('vertical_slash:{"share": 0.95}', {"name": "vertical_slash", "share": 0.95}),
    ],
)
def test_methods_are_named_in_a_word(text, method):
    assert parse_method(text) == method
    assert resolved({"method": parse_method(text)})["method"].items() >= method.items()


class Taker:
    """Stands for an engine; notes whose turn it was."""

    def __init__(self, kind, seconds, turns):
        self.kind, self.seconds, self.turns = kind, seconds, turns

    def ask(self, request):
        self.turns.append((self.kind, request["count"]))
        return {
            "seconds": self.seconds,
            "sparse_tokens": 5,
            "density": 0.5,
            "redone": 0.0,
        }


def test_engines_take_turns_and_both_come_first_at_times():
    turns = []
    found = ttft.time_side_by_side(Taker("dense", 2.0, turns), Taker("sparse", 1.0, turns), 65536, 2)
    assert found == {"dense": [2.0] * 2, "sparse": [1.0] * 2, "sparse_tokens": 5, "density": 0.5, "redone": 0.0}
    assert turns[:2] == [("sparse", True), ("dense", False)]
    assert [kind for kind, _ in turns[2:]] == ["sparse", "dense", "dense", "sparse"]


def test_engines_that_are_up_at_once_answer_in_turns(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(
        "from benchmarks.processes import serve_requests\n"
        "assert serve_requests(lambda kind, spec: lambda request: [kind, spec['n'] + request])\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{results.ROOT}")
    with EngineProcess("toy", "dense", {"n": 10}) as dense, EngineProcess("toy", "sparse", {"n": 20}) as sparse:
        assert [dense.ask(1), sparse.ask(1), dense.ask(2)] == [["dense", 11], ["sparse", 21], ["dense", 12]]


def test_engines_that_are_up_one_after_the_other_warm_up_first():
    turns = []
    dense, _ = ttft.time_in_turn(Taker("dense", 2.0, turns), 131072, 1, 32768)
    sparse, found = ttft.time_in_turn(Taker("sparse", 1.0, turns), 131072, 1, 131072)
    assert (dense, sparse, found["density"]) == ([2.0], [1.0], 0.5)
    assert turns == [("dense", False), ("dense", False), ("sparse", True), ("sparse", False)]


def test_lengths_are_measured_in_parts(tmp_path, monkeypatch):
    run = {"gpu": "a card", "command": "python -m it", "date": "2026-01-01"}
    monkeypatch.setattr(results, "describe_run", lambda *_: run)
    monkeypatch.setattr(ttft, "EngineProcess", lambda module, kind, *_: nullcontext(Taker(kind, 1.0, [])))
    monkeypatch.chdir(tmp_path)

    def main(out, *arguments):
        monkeypatch.setattr(sys, "argv", ["ttft", "--out", out, *arguments])
        ttft.main()
        return json.loads((tmp_path / out).read_text())

    one, two = (main(f"{tokens}.json", "--tokens", tokens) for tokens in ("8192", "131072"))
    whole = main("whole.json", "--merge", "8192.json", "131072.json")
    assert whole["rows"] == one["rows"] + two["rows"]
    assert whole["seconds"] == one["seconds"] | two["seconds"]
    assert whole["settings"] == one["settings"] == two["settings"]
    with pytest.raises(SystemExit, match="2 times: leave a part out"):
        main("whole.json", "--merge", "8192.json", "8192.json")
    assert json.loads((tmp_path / "whole.json").read_text()) == whole  # a refused merge writes nothing


def test_parts_of_two_models_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "describe_run", lambda *_: {"command": "python -m it", "date": "2026-01-01"})
    monkeypatch.setattr(ttft, "EngineProcess", lambda module, kind, *_: nullcontext(Taker(kind, 1.0, [])))
    monkeypatch.chdir(tmp_path)

    def main(out, *arguments):
        monkeypatch.setattr(sys, "argv", ["ttft", "--out", out, *arguments])
        ttft.main()

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        main(f"{name}.json", "--model", str(tmp_path / name), "--text", "t", "--tokens", "8192")
    assert json.loads((tmp_path / "one.json").read_text())["settings"]["model"]["name"] == "one"
    with pytest.raises(SystemExit, match=r"settings\.model\.config_sha256, settings\.model\.name"):
        main("whole.json", "--merge", "one.json", "two.json")
    main("seed.json", "--model", "two", "--text", "t", "--tokens", "131072", "--seed", "5")
    with pytest.raises(SystemExit, match=r"they differ in settings\.seed"):
        main("whole.json", "--merge", "two.json", "seed.json")
    assert not (tmp_path / "whole.json").exists()


def test_an_engine_on_several_gpus_is_a_process_for_each(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(
        "import os\n"
        "from benchmarks.processes import serve_requests\n"
        "told = [os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')]\n"
        "assert serve_requests(lambda kind, spec: lambda request: [*told, spec['n'] + request])\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{results.ROOT}")
    with EngineProcess("toy", "dense", {"n": 10}, gpus=2) as engine:
        assert engine.ask(1) == ["0", "0", "2", 11]
    assert on_gpus(1) == {}
    assert on_gpus(2)["tensor_parallel_size"] == 2


def test_one_process_of_several_that_ends_ends_all(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text(
        "import os, sys, time\n"
        "from benchmarks.processes import serve_requests\n"
        "def answer(request):\n"
        "    sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)\n"
        "serve_requests(lambda kind, spec: answer)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{results.ROOT}")
    with EngineProcess("toy", "dense", {}, gpus=2) as engine, pytest.raises(SystemExit, match="status 3"):
        engine.ask(1)


def test_an_engine_that_fails_stops_the_benchmark(tmp_path, monkeypatch):
    (tmp_path / "toy.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{results.ROOT}")
    with pytest.raises(SystemExit, match="dense engine of toy ended with status 3"):
        EngineProcess("toy", "dense", {})
