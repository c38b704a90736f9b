# SPDX-License-Identifier: Apache-2.0
"""Serving features on vLLM's real engine for the CPU: with every key kept, sparse prefill does not change answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.serving.conftest import ON_GPU
from tests.serving.engine_jobs import Outcome, run
from tests.serving.feature_jobs import HAS_GRAMMARS, LENGTHS, MANY, PLAIN, PROMPTS, SEEING, jobs
from tests.serving.features import (
    SPARSE,
    Answer,
    Report,
    Tolerance,
    answers,
    compare,
    density,
    metric,
    reporter,
    served,
    sparse_tokens,
)

pytestmark = [pytest.mark.serving, pytest.mark.skipif(ON_GPU, reason="compares with vLLM's CPU backend")]

TIMEOUT_S = 560
ROUNDING = Tolerance(most=1e-3, mean=1e-4)  # float32
ROUNDING_TO_BFLOAT16 = Tolerance(most=0.1, mean=0.02)
TOKENS = sum(LENGTHS)
ENOUGH = 0.8 * TOKENS  # pass the gate; short chunks and the short prompt do not
# vLLM keeps the states of linear attention in float32 where the CPU has such instructions, and then takes longer pages.
LINEAR_PAGE = 96 if torch.cpu._is_avx512_bf16_supported() else 64

Outcomes = dict[str, Outcome]


@pytest.fixture(scope="module")
def outcomes(logs: Path) -> Outcomes:
    """What came of every job, by its name."""
    models = logs / "feature models"
    models.mkdir()
    return run(jobs(models), logs / "features", TIMEOUT_S, TORCHDYNAMO_DISABLE="1")


@pytest.fixture
def report(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Report:
    return reporter(request.node.name, record_property)


def plain(outcomes: Outcomes, name: str, stock: bool = False) -> list[dict[str, Any]]:
    """What the plain decoder answered in a step."""
    found: list[dict[str, Any]] = served(outcomes["plain stock" if stock else "plain"]).steps[list(PLAIN).index(name)]
    return found


def many_tokens(outcomes: Outcomes) -> list[Answer]:
    """The stock engine's answers of many tokens."""
    return answers(plain(outcomes, "many tokens", stock=True))


@pytest.mark.parametrize("name", ["greedy", "many tokens", "two answers"])
def test_a_plain_decoder(name: str, outcomes: Outcomes, report: Report) -> None:
    ours, stock = (answers(plain(outcomes, name, stock)) for stock in (False, True))
    report(outcomes["plain"], difference=compare(ours, stock, ROUNDING)._asdict())
    assert len(ours) == len(PROMPTS) * (2 if name == "two answers" else 1)
    assert sparse_tokens(outcomes["plain"], until=0) >= ENOUGH
    assert density(outcomes["plain"]) == 1


def test_logprobs_of_prompts(outcomes: Outcomes) -> None:
    ours, stock = (plain(outcomes, "prompt logprobs", stock) for stock in (False, True))
    for length, mine, theirs in zip(LENGTHS, ours, stock, strict=True):
        assert len(mine["prompt_logprobs"]) == length - 1
        assert mine["prompt_logprobs"] == pytest.approx(theirs["prompt_logprobs"], abs=ROUNDING.most)


def test_beams(outcomes: Outcomes) -> None:
    ours, stock = (plain(outcomes, "beams", stock) for stock in (False, True))
    for mine, theirs in zip(ours, stock, strict=True):
        assert len(mine["tokens"]) == 2
        assert mine["tokens"] == theirs["tokens"]
        assert mine["sums"] == pytest.approx(theirs["sums"], abs=10 * ROUNDING.most)
    at = list(PLAIN).index("beams")
    assert sparse_tokens(outcomes["plain"], until=at, since=at - 1) > LENGTHS[1] // 2


def test_a_pause_in_the_middle_of_a_prompt(outcomes: Outcomes) -> None:
    at = list(PLAIN).index("a pause")
    paused = served(outcomes["plain"]).steps[at]
    assert paused["stood_still"]
    since = outcomes["plain"].counted[at - 1][0]["tokens"][SPARSE]
    assert 0 < paused["read_before"][SPARSE] - since < LENGTHS[0]
    compare([paused["answer"]], answers(plain(outcomes, "greedy", stock=True))[:1], ROUNDING)


@pytest.mark.skipif(not HAS_GRAMMARS, reason="vLLM's grammars need xgrammar, which is not there")
def test_structured_outputs(outcomes: Outcomes) -> None:
    ours, stock = (answers(plain(outcomes, "a schema", stock)) for stock in (False, True))
    compare(ours, stock, ROUNDING)
    assert [json.loads(each["text"])["colour"] in ("red", "blue") for each in ours] == [True] * len(PROMPTS)


@pytest.mark.parametrize("method", ["ngram", "draft_model", "eagle"])
def test_speculative_decoding(method: str, outcomes: Outcomes, report: Report) -> None:
    ours = served(outcomes[method])
    drafted, accepted = (metric(ours, f"spec_decode_num_{name}_tokens") for name in ("draft", "accepted"))
    report(ours, difference=compare(answers(ours.steps[0]), many_tokens(outcomes), ROUNDING)._asdict())
    assert drafted > 0
    if method == "ngram":
        assert 0 < accepted < drafted
    elif method == "draft_model":  # its own draft
        assert accepted == drafted
    assert sparse_tokens(ours) >= ENOUGH


def test_an_adapter(outcomes: Outcomes) -> None:
    ours, stock = served(outcomes["adapter"]), served(outcomes["adapter stock"])
    with_it, without = (compare(answers(ours.steps[at]), answers(stock.steps[at]), ROUNDING) for at in (0, 1))
    assert with_it.equal == without.equal == with_it.tokens
    assert answers(ours.steps[0])[0]["tokens"] != answers(ours.steps[1])[0]["tokens"]
    assert sparse_tokens(ours, until=0) >= ENOUGH


def test_a_preempted_prompt_is_read_again_by_priority(outcomes: Outcomes, report: Report) -> None:
    ours = served(outcomes["preempted"])
    report(ours, difference=compare(answers(ours.steps[0]), many_tokens(outcomes), ROUNDING)._asdict())
    assert metric(ours, "num_preemptions") > 0
    # The second prompt has the lowest priority, so it was preempted and read again.
    assert sparse_tokens(ours) > sparse_tokens(outcomes["plain"], until=0) + LENGTHS[1] // 2
    assert len(answers(ours.steps[0])[1]["tokens"]) == MANY


@pytest.mark.parametrize(
    ("job", "page"), [("experts", 0), ("state space", 544), ("linear attention", LINEAR_PAGE), ("images", 0)]
)
def test_other_models(job: str, page: int, outcomes: Outcomes, report: Report) -> None:
    ours, stock = served(outcomes[job]), served(outcomes[f"{job} stock"])
    rounding = ROUNDING_TO_BFLOAT16 if job == "linear attention" else ROUNDING
    difference = compare(answers(ours.steps[0]), answers(stock.steps[0]), rounding)
    report(ours, difference=difference._asdict())
    assert sparse_tokens(ours) >= 0.8 * (800 * len(SEEING) if job == "images" else TOKENS)
    assert "MInference: 2 of 2 attention layers may run sparse." in ours.log
    if page:
        assert any(f"Setting attention block size to {page} tokens" in message for message in ours.log)
    if job == "images":
        one, another = (each["logprobs"] for each in answers(ours.steps[0]))
        assert one != pytest.approx(another, abs=1e-2)  # the same text beside other pixels


def test_embeddings_of_a_causal_model(outcomes: Outcomes) -> None:
    ours, stock = served(outcomes["embeddings"]), served(outcomes["embeddings stock"])
    for vector, expected in zip(ours.steps[0], stock.steps[0], strict=True):
        assert vector == pytest.approx(expected, abs=ROUNDING.most)
    assert sparse_tokens(ours) >= ENOUGH


def test_latent_attention_is_none_of_ours_and_the_log_says_so(outcomes: Outcomes) -> None:
    # On a GPU vLLM refuses such a model at start. On a CPU it takes its own backend, whatever was asked for.
    ours, stock = served(outcomes["latent attention"]), served(outcomes["latent attention stock"])
    compare(answers(ours.steps[0]), answers(stock.steps[0]), ROUNDING)
    [message] = [each for each in ours.log if "attention layers is ours" in each]
    assert message.startswith("MInference: none of the model's 2 attention layers is ours")
    assert ours.counted[-1][0]["tokens"] == {}


def test_two_ranks_cut_a_pattern_file_as_one_reads_it(outcomes: Outcomes, report: Report) -> None:
    one, two = served(outcomes["1 ranks"]), served(outcomes["2 ranks"])
    difference = compare(answers(two.steps[0]), answers(one.steps[0]), ROUNDING)
    report(two, difference=difference._asdict())
    assert difference.equal == difference.tokens
    first, second = two.counted[0]
    assert first["tokens"] == one.counted[0][0]["tokens"] and first["tokens"][SPARSE] >= ENOUGH
    assert second["tokens"] == {}  # the same prompts: one rank counts them
    # The first rank has the heads that keep little, and what they leave out changes the model's answers.
    assert density(two) < density(one) < density(two, rank=1) == 1
    pairs = zip(answers(one.steps[0]), answers(plain(outcomes, "greedy", stock=True)), strict=True)
    assert any(mine["logprobs"] != pytest.approx(theirs["logprobs"], abs=0.01) for mine, theirs in pairs)
