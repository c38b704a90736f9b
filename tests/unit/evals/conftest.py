# SPDX-License-Identifier: Apache-2.0
"""Two servers and samples that they answer, for the tests of `minference-vllm eval`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minference_vllm import cli
from minference_vllm.evals import plots, prepare, work
from minference_vllm.evals.prepare import Header, Settings
from minference_vllm.evals.sample import Kind, Sample
from tests.unit.evals.fake_openai import FakeServer, fake_server
from tests.unit.evals.runs import SAMPLES, SENTENCE, samples
from tests.unit.evals.tokenizer import save_tokenizer

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


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake server's metrics are never behind; figures take most of a second."""
    monkeypatch.setattr(work, "STILL_S", 0.0)
    monkeypatch.setattr(work, "POLL_S", 0.01)
    monkeypatch.setattr(plots, "draw", lambda report: iter(()))  # test_page.py


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


@pytest.fixture
def knows(prepared: Path) -> Callable[[dict[str, Any]], str]:
    """Answers every question right."""
    answers = {sample.prompt: " ".join(sample.references) for sample in samples(prepared)}
    return lambda request: answers.get(request["prompt"], "") if isinstance(request["prompt"], str) else ""


@pytest.fixture
def dense(knows: Callable[[dict[str, Any]], str], quick: None) -> Iterator[FakeServer]:
    with fake_server("dense", knows) as server:
        yield server


@pytest.fixture
def sparse(knows: Callable[[dict[str, Any]], str]) -> Iterator[FakeServer]:
    with fake_server("sparse", knows) as server:
        yield server


@pytest.fixture(scope="session")
def tokenizer_name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def prepare_with(tokenizer_name: str, tmp_path: Path) -> Callable[..., int]:
    (tmp_path / "text.txt").write_text(SENTENCE * 400)

    def run(*options: str) -> int:
        made = ["--prepare", str(tmp_path / "made"), "--tokenizer", tokenizer_name]
        return cli.main(["eval", *made, *options])

    return run
