# SPDX-License-Identifier: Apache-2.0
"""The model that is searched: what cannot be searched is refused, and what is read is read through the chooser."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minference_vllm.compat import engines
from minference_vllm.errors import ConfigError
from minference_vllm.metrics.snapshot import Snapshot
from minference_vllm.ops import Kernel
from minference_vllm.reason import Reason
from minference_vllm.recall import Floors
from minference_vllm.search import reader
from minference_vllm.search.reader import Reader
from tests.unit.search.model import CASE, CPU, FakeReader

PROMPT = tuple(range(10))


class Model(torch.nn.Module):
    """Gives each token's number as its state, and hides its logits nowhere."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(tokens, 16).float()

    def compute_logits(self, states: torch.Tensor) -> torch.Tensor:
        return 3 * states


class Engine:
    """What the reader needs of vllm.LLM."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.model = Model()
        self.steps = steps
        self.llm_engine = SimpleNamespace(vllm_config=None)

    def apply_model(self, function: Any) -> list[Any]:
        return [function(self.model)]

    def read(self, tokens: Any) -> None:
        for part in torch.tensor(tokens).split(list(self.steps)):
            self.model(part)


def layer(position: int, **changes: Any) -> SimpleNamespace:
    runtime = SimpleNamespace(
        counters=SimpleNamespace(snapshot=Snapshot), device=CPU, floors=Floors(0.0, 0.0),
        method=SimpleNamespace(kernel=Kernel.REFERENCE),
    )  # fmt: skip
    plain = {"position": position, "index": position, "dense_reason": None, "shape": CASE.shape, "runtime": runtime}
    return SimpleNamespace(**{**plain, **changes})


def make(monkeypatch: pytest.MonkeyPatch, layers: list[Any], steps: tuple[int, ...] = (6, 4), **options: Any) -> Reader:
    monkeypatch.setattr(reader, "start_engine", lambda *_: Engine(steps))
    monkeypatch.setattr(reader, "our_layers", lambda *_: layers)
    monkeypatch.setattr(reader, "served_model", lambda *_, **__: SimpleNamespace(geometry=FakeReader.geometry))
    monkeypatch.setattr(engines, "read_tokens", lambda llm, tokens: llm.read(tokens))
    return Reader("a model", options)


def test_layers_that_may_run_sparse_are_the_ground(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = layer(1, dense_reason=Reason.DENSE_LAYER, shape=None)
    ground = make(monkeypatch, [layer(0), dense, layer(2, index=5)]).ground
    assert ground.indices == {0: 0, 2: 5}
    assert (ground.shape, ground.device, ground.kernel) == (CASE.shape, CPU, Kernel.REFERENCE)


@pytest.mark.parametrize(
    ("layers", "options", "said"),
    [
        ([layer(0)], {"tensor_parallel_size": 2}, "tensor_parallel_size is 2: leave it out"),
        ([layer(0)], {"pipeline_parallel_size": 4}, "pipeline_parallel_size is 4: leave it out"),
        ([layer(0, dense_reason=Reason.DENSE_LAYER)], {}, "None of the attention layers of 'a model' may run sparse"),
        ([layer(0, index=None)], {}, "differ in their heads or have no numbers"),
        ([layer(0), layer(1, shape=replace(CASE.shape, head_dim=128))], {}, "differ in their heads"),
        ([layer(0, shape=replace(CASE.shape, has_fp8_kv=True))], {}, "leave kv_cache_dtype out of --engine"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    layers: list[Any], options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=said):
        make(monkeypatch, layers, **options)


def test_states_are_those_that_predict_the_scored_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    made, chooser = make(monkeypatch, [layer(0)]), object()
    for _ in range(2):  # nothing is left of the first reading
        states = made.read(PROMPT, chooser)  # type: ignore[arg-type]
        # The last five of ten tokens are scored, each from the one before it.
        assert states.argmax(-1).tolist() == [4, 5, 6, 7, 8]
    assert made._runtime.chooser is chooser


@pytest.mark.parametrize("steps", [(6, 3, 1), (10,)])
def test_a_prompt_may_come_in_any_steps(steps: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    states = make(monkeypatch, [layer(0)], steps).read(PROMPT, object())  # type: ignore[arg-type]
    assert states.argmax(-1).tolist() == [4, 5, 6, 7, 8]


def test_states_that_are_not_the_prompts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(monkeypatch, [layer(0)], steps=(6, 5))
    monkeypatch.setattr(engines, "read_tokens", lambda llm, tokens: llm.read([*tokens, 0]))  # padded
    with pytest.raises(ConfigError, match="vLLM computed 11 hidden states of 10 tokens"):
        made.read(PROMPT, object())  # type: ignore[arg-type]
    monkeypatch.setattr(engines, "read_tokens", lambda *_: None)
    with pytest.raises(ConfigError, match="vLLM computed 0 hidden states of 10 tokens"):
        made.read(PROMPT, object())  # type: ignore[arg-type]


def test_a_fault_of_the_sparse_path_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(monkeypatch, [layer(0)])
    failed = Snapshot()
    failed.tokens["dense", Reason.SPARSE_FAULT.value] += 1
    made._runtime.counters.snapshot = lambda: failed
    with pytest.raises(ConfigError, match="its result is not used"):
        made.read(PROMPT, object())  # type: ignore[arg-type]


def test_divergence_is_that_of_the_next_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "ROWS_AT_ONCE", 2)
    made = make(monkeypatch, [layer(0)])
    generator = torch.Generator().manual_seed(0)
    exact, other = torch.randn(2, 5, 16, generator=generator)
    wanted, found = (3 * states for states in (exact, other))
    expected = torch.nn.functional.kl_div(found.log_softmax(-1), wanted.softmax(-1), reduction="sum") / 5
    assert made.divergence(exact, other) == pytest.approx(float(expected), rel=1e-5)
    assert made.divergence(exact, exact) == pytest.approx(0.0, abs=1e-7)
