# SPDX-License-Identifier: Apache-2.0
"""benchmarks.fidelity pairs prompts, says how sure it is, and puts parts together. None starts an engine."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from benchmarks import DENSE, SPARSE, facts, fidelity, interval, parse_method, resolved, results, rows
from benchmarks.cases import Case as Shape
from benchmarks.cases import make_inputs
from minference_vllm import attention
from minference_vllm.config import MInferenceConfig
from minference_vllm.methods import make_method
from minference_vllm.ops import Kernel
from minference_vllm.scratch import ScratchShape
from minference_vllm.tuning.timing import make_state

RUN = {"gpu": "a card", "commit": "abc", "command": "python -m it", "date": "2026-01-01"}


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (7, 2.3646), (23, 2.0687), (60, 2.0003)],
)
def test_quantiles_are_those_of_the_tables(degrees: int, quantile: float) -> None:
    assert interval.t_quantile(degrees) == pytest.approx(quantile, abs=5e-5)


def test_the_interval_of_a_mean_holds_it_as_often_as_it_says() -> None:
    drawn = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    ends = [interval.of_mean(numbers) for numbers in drawn]
    held = sum(low < 0 < high for low, high in ends) / len(drawn)
    assert held == pytest.approx(interval.LEVEL, abs=0.01)
    assert interval.of_mean([1.0]) is None


def prompt(answers: float, loss: float) -> dict[str, float | None]:
    of_dense = {"answers_dense": 1.0, "answer_loss_dense": 0.5}
    return {"kl": 0.1, "density": None, **of_dense, "answers_sparse": answers, "answer_loss_sparse": loss}


def test_prompts_of_all_texts_of_a_length_are_pooled_too() -> None:
    found = {
        (8, "a"): [prompt(0.9, 0.5), prompt(1.0, 0.7)],
        (16, "a"): [prompt(0.8, 0.5)],
        (8, "b"): [prompt(0.8, 0.6), prompt(0.9, 0.6)],
        (16, "b"): [prompt(1.0, 0.5)],
    }
    made = rows.make_rows({"method": "block"}, found)
    assert [(row["tokens"], row["text"], row["prompts"]) for row in made] == [
        (8, "a", 2), (16, "a", 1), (8, "b", 2), (16, "b", 1), (8, "all", 4), (16, "all", 2)
    ]  # fmt: skip
    pooled = made[4]
    assert (pooled["answers_sparse"], pooled["density"], pooled["method"]) == (0.9, None, "block")
    low, high = interval.of_mean([-0.1, 0.0, -0.2, -0.1]) or (0, 0)
    assert (pooled["answers_low"], pooled["answers_high"]) == (round(low, 5), round(high, 5))
    assert pooled["answer_loss_low"] < 0.1 < pooled["answer_loss_high"]
    assert made[1]["answers_low"] is None
    assert len(rows.make_rows({}, {(8, "a"): [prompt(1.0, 0.5)]})) == 1


@pytest.mark.parametrize("tokens", [4096, 8192])
def test_the_gate_lets_the_shortest_prompts_through(tokens: int) -> None:
    asked = 15 * len(facts.CITIES)  # of questions and answers: fewer than they take
    assert tokens - facts.QUESTIONS_TOKENS + asked >= fidelity.GATE["min_seq_len"]


@pytest.mark.parametrize(
    "text", ['block:{"local_tokens": 1048576}', 'block:{"local_tokens": 16384}', 'block:{"share": 1, "max_density": 1}']
)
def test_a_control_keeps_everything(text: str) -> None:
    settings = MInferenceConfig.model_validate(resolved({"method": parse_method(text)}))
    method, device = make_method(settings.method, Kernel.REFERENCE), torch.device("cpu")
    inputs = make_inputs(Shape(1024, 1, 1, 2, 1, 64), device, 0)
    chunk = inputs.chunk(512, torch.empty_like(inputs.q[512:]))
    state = make_state(method, ScratchShape(2, 1, 64, torch.bfloat16, 1024, 512), device)
    attention.prefill(chunk, method, state)
    assert int(state.attend.kept_pairs) == 2 * chunk.causal_pairs


class Engine:
    """Stands for an engine; what it answers tells which prompt it was asked.

    Attributes:
        shares: for each sparse engine that was started, the shares that it was given one after the other.
    """

    shares: ClassVar[list[list[float]]] = []

    def __init__(self, module: str, kind: str, spec: dict[str, Any], gpus: int) -> None:
        self.kind = kind
        if kind == SPARSE:
            self.shares.append([spec["minference"]["method"].get("share")])

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ask(self, request: dict[str, Any]) -> dict[str, float | None]:
        if settings := request.get("settings"):
            self.shares[-1].append(settings["method"]["share"])
            return {}
        return {} if self.kind == DENSE else prompt(request["answers"], 0.5)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the benchmark with these arguments and gives what it wrote."""
    monkeypatch.setattr(results, "describe_run", lambda *_: RUN)
    monkeypatch.setattr(fidelity, "EngineProcess", Engine)
    monkeypatch.setattr(fidelity, "load_text", lambda name: name)
    monkeypatch.setattr(
        fidelity,
        "make_requests",
        lambda options, _: {(at, name): [{"answers": 0.5}] for name in options.texts for at in options.tokens},
    )

    for name in ("m", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)

    def main(out: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["fidelity", "--out", out, *arguments])
        fidelity.main()
        written: dict[str, Any] = json.loads(Path(out).read_text())
        return written

    return main


def test_lengths_and_methods_are_measured_in_parts(run: Callable[..., dict[str, Any]]) -> None:
    of = ("--model", "m", "--texts", "a", "b", "--chunks", "8192")
    one = run("one.json", *of, "--tokens", "28672", "--methods", "block")
    two = run("two.json", *of, "--tokens", "4096", "8192", "--methods", "block", "200:400")
    whole = run("whole.json", "--merge", "one.json", "two.json")
    assert whole["rows"] == one["rows"] + two["rows"]
    assert whole["settings"]["sparse"] == one["settings"]["sparse"] | two["settings"]["sparse"]
    assert whole["settings"] == two["settings"]
    assert [row["text"] for row in one["rows"]] == ["a", "b", "all"]
    with pytest.raises(SystemExit, match="2 times: leave a part out"):
        run("whole.json", "--merge", "one.json", "two.json", "one.json")
    assert json.loads(Path("whole.json").read_text()) == whole  # a refused merge writes nothing


@pytest.mark.parametrize(
    ("option", "shares"), [([], [[0.5], [0.9], [0.5], [0.9]]), (["--one-engine"], [[0.5, 0.9], [0.5, 0.9]])]
)
def test_one_engine_takes_the_settings_of_all_methods_in_turn(
    option: list[str], shares: list[list[float]], run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "shares", [])
    methods = ('block:{"share": 0.5}', '{"method": {"name": "block", "share": 0.9}, "recall_floor": 0.5}')
    of = ("--model", "m", "--texts", "a", "--tokens", "8192", "--chunks", "8192", "2048")
    written = run("one.json", *of, "--methods", *methods, *option)
    assert Engine.shares == shares
    assert [(row["method"], row["chunk"]) for row in written["rows"]] == [
        (method, chunk) for chunk in (8192, 2048) for method in methods
    ]
    assert written["settings"]["sparse"][f"{methods[1]}, chunks of 2048"]["recall_floor"] == 0.5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("--kv-cache-dtype", "fp8"), r"they differ in settings\.engine\.kv_cache_dtype\."),
        (("--model", "other"), r"they differ in settings\.model\.config_sha256, settings\.model\.name\."),
        (("--seed", "7"), r"they differ in settings\.seed\."),
        (("--texts", "a"), r"^two\.json lacks texts that another part has: b$"),
        (("--texts", "a", "b", "c"), r"^one\.json lacks texts that another part has: c$"),
    ],
)
def test_parts_of_different_runs_are_refused(
    changes: tuple[str, ...], said: str, run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    of = ("--model", "m", "--texts", "a", "b", "--methods", "block")
    run("one.json", *of, "--tokens", "28672")
    run("two.json", *of, "--tokens", "8192", *changes)
    with pytest.raises(SystemExit, match=said):
        run("whole.json", "--merge", "one.json", "two.json")
    assert not (tmp_path / "whole.json").exists()


def test_what_is_to_be_measured_must_be_named(run: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(SystemExit):
        run("none.json", "--model", "m")
    with pytest.raises(SystemExit, match=r"nowhere holds no config\.json: name a model's folder"):
        run("none.json", "--model", "nowhere", "--texts", "a")
