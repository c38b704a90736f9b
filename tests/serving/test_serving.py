# SPDX-License-Identifier: Apache-2.0
"""`vllm serve --attention-backend minference` as its users meet it, with a small model on whatever machine this is."""

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from demo.server import Server
from tests.serving.conftest import Continuation, FullBudget, Start
from tests.serving.prompts import GARDEN, LIBRARY, Question
from tests.serving.server import MODEL, needs_model

pytestmark = [pytest.mark.serving, needs_model]

# vLLM reuses cached pages only between requests with the same salt.
new_salts: Iterator[str] = map("salt {}".format, itertools.count())
# Two kernels that round differently may swap tokens whose log-probabilities are this close.
TIE = 0.05


class Reply(str):
    prompt_tokens: int


def ask(server: Server, question: Question, salt: str) -> Reply:
    """A greedy answer of 12 tokens."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=600, max_retries=0)
    reply = client.chat.completions.create(
        model=str(MODEL),
        messages=[{"role": "user", "content": question.prompt}],
        temperature=0,
        max_tokens=12,
        extra_body={"cache_salt": salt, "ignore_eos": True},
    )
    text = Reply(reply.choices[0].message.content)
    text.prompt_tokens = reply.usage.prompt_tokens
    return text


def ask_streaming(server: Server, question: Question, salt: str) -> str:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=600, max_retries=0)
    stream = client.chat.completions.create(
        model=str(MODEL),
        messages=[{"role": "user", "content": question.prompt}],
        temperature=0,
        max_tokens=12,
        stream=True,
        extra_body={"cache_salt": salt, "ignore_eos": True},
    )
    return "".join(event.choices[0].delta.content or "" for event in stream)


def prefill_tokens(server: Server, **labels: str) -> float:
    """The counter, once it has stood still for longer than workers take to publish."""
    value, since = -1.0, time.monotonic()
    while time.monotonic() - since < 2.5:
        if (now := server.metric("minference_prefill_tokens_total", **labels)) != value:
            value, since = now, time.monotonic()
        time.sleep(0.25)
    return value


@pytest.fixture(scope="module")
def alone(sparse: Server) -> dict[Question, Reply]:
    """Each question's answer when the server has nothing else to do."""
    return {question: ask(sparse, question, next(new_salts)) for question in (LIBRARY, GARDEN)}


def test_a_chunked_prompt_is_served_sparse_and_its_fact_is_found(sparse: Server) -> None:
    before = prefill_tokens(sparse)
    reply = ask(sparse, LIBRARY, next(new_salts))
    assert LIBRARY.answer in reply
    assert reply.prompt_tokens > 2 * 1024
    # Every token of the prompt is counted once, and all but a short last chunk went sparse.
    assert prefill_tokens(sparse) - before == reply.prompt_tokens
    assert prefill_tokens(sparse, path="dense") < 128
    assert sparse.metric("minference_prefill_chunks_total", path="sparse") >= 2
    assert 0 < sparse.metric("minference_density") < 0.95


def test_concurrent_prompts_are_answered_as_each_alone(sparse: Server, alone: dict[Question, Reply]) -> None:
    before = prefill_tokens(sparse, path="sparse")
    with ThreadPoolExecutor(2) as pool:
        futures = {question: pool.submit(ask, sparse, question, next(new_salts)) for question in alone}
        together = {question: future.result() for question, future in futures.items()}
    assert together == alone
    assert all(question.answer in reply for question, reply in together.items())
    # They shared chunks of 1,024 tokens, so that short ones were left over.
    total = sum(reply.prompt_tokens for reply in together.values())
    assert prefill_tokens(sparse, path="sparse") - before > 0.9 * total


def test_a_repeated_prompt_reuses_its_prefix_and_is_answered_the_same(sparse: Server) -> None:
    salt = next(new_salts)
    first = ask(sparse, GARDEN, salt)
    before = prefill_tokens(sparse)
    assert ask(sparse, GARDEN, salt) == first
    assert GARDEN.answer in first
    assert 0 < prefill_tokens(sparse) - before < first.prompt_tokens / 4


def test_decoding_after_a_sparse_prefill_streams_the_same_answer(sparse: Server, alone: dict[Question, Reply]) -> None:
    assert ask_streaming(sparse, LIBRARY, next(new_salts)) == alone[LIBRARY]


def assert_same_but_for_ties(ours: Continuation, stock: Continuation) -> None:
    """Equal up to the first token at which the stock backend itself is of two minds."""
    for position, (token, expected) in enumerate(zip(ours.tokens, stock.tokens, strict=True)):
        if token != expected:
            top = stock.logprobs[position]
            assert token in top, f"{token!r} for {expected!r} at {position}"
            assert top[expected] - top[token] <= TIE
            return
        assert abs(ours.logprobs[position][token] - stock.logprobs[position][token]) < 2 * TIE


def test_with_the_full_budget_greedy_text_is_the_stock_backends(
    full_budget: FullBudget, stock: list[Continuation]
) -> None:
    assert full_budget.sparse_tokens > 1024 * len(stock)
    for ours, theirs in zip(full_budget.continuations, stock, strict=True):
        assert_same_but_for_ties(ours, theirs)
    same = [ours.tokens == theirs.tokens for ours, theirs in zip(full_budget.continuations, stock, strict=True)]
    assert sum(same) >= len(same) - 1


def test_another_plugin_on_our_backend_slot_is_reported_and_we_serve(full_budget: FullBudget) -> None:
    (line,) = {line[line.index("CUSTOM") :] for line in full_budget.log.splitlines() if "rival.Backend" in line}
    assert "MInference takes it over" in line
    assert "VLLM_PLUGINS" in line
    assert full_budget.sparse_tokens > 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unknown key", ["minference.vertical_sizes is not a setting", "vertical_size, slash_size"]),
        ("negative size", ["minference.slash_size=-5", "greater than or equal to 1"]),
        ("wrong type", ["minference.min_seq_len='lots'", "valid integer"]),
        ("broken file", ["MINFERENCE_CONFIG=", "broken.json", "not valid JSON"]),
    ],
)
def test_a_bad_setting_stops_the_start_with_one_sentence(
    name: str, expected: list[str], refused: dict[str, Start]
) -> None:
    status, log = refused[name]
    assert status not in (None, 0)
    mark = "MInference cannot start: "
    (sentence,) = {line.partition(mark)[2] for line in log.splitlines() if mark in line}
    assert all(part in sentence for part in expected)
    assert sentence.endswith(".")
