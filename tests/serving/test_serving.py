# SPDX-License-Identifier: Apache-2.0
"""`vllm serve --attention-backend minference` as its users meet it, with a small model on whatever machine this is."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from demo.server import Server
from minference_vllm.config import load_config
from minference_vllm.patterns import resolve
from minference_vllm.salt import salt_of
from tests.serving.client import Reply, complete, prefilled, stream, tokenize
from tests.serving.conftest import CHUNK, EVERY_KEY, MIN_CHUNK, FullBudget, Start
from tests.serving.features import Answer
from tests.serving.prompts import COPIES, GARDEN, LIBRARY, Question
from tests.serving.server import needs_model

pytestmark = [pytest.mark.serving, needs_model]

# vLLM reuses cached pages only between requests with the same salt.
new_salts: Iterator[str] = map("salt {}".format, itertools.count())
SURE_TOKENS = 6
RECALL = (
    ("minference_prefill_chunks_total", {"path": "sparse"}),
    ("minference_recall_heads_total", {"le": "+Inf"}),
)


class Alone(NamedTuple):
    """The reply to each question when the server had nothing else to do, and what it counted."""

    replies: dict[Question, Reply]
    tokens: float
    sparse_tokens: float


@pytest.fixture(scope="module")
def alone(sparse: Server) -> Alone:
    before = prefilled(sparse)
    replies = {question: complete(sparse, question.prompt, next(new_salts), 24) for question in (LIBRARY, GARDEN)}
    after = prefilled(sparse)
    return Alone(replies, after.tokens - before.tokens, after.sparse - before.sparse)


def test_chunked_prompts_are_served_sparse_and_their_facts_are_found(sparse: Server, alone: Alone) -> None:
    for question, reply in alone.replies.items():
        assert question.answer in reply.text
        assert reply.prompt_tokens > 2 * CHUNK
    # Every token of the prompts is counted once, and all went sparse: the last chunks are long enough, too.
    assert alone.tokens == alone.sparse_tokens == sum(reply.prompt_tokens for reply in alone.replies.values())
    assert sparse.metric("minference_prefill_chunks_total", path="sparse") >= 6
    assert 0 < sparse.metric("minference_density") < 0.95
    assert sparse.metric("minference_info") == 1
    assert sparse.metric("minference_scratch_bytes") > 2**20
    # Every head of every layer was measured in every chunk.
    chunks, heads = (sparse.metric(name, **labels) for name, labels in RECALL)
    assert heads > 0 and heads % chunks == 0
    assert 0.5 < sparse.metric("minference_recall_mean", layer="0", head="0") <= 1


def test_concurrent_prompts_are_answered_as_each_alone(sparse: Server, alone: Alone) -> None:
    before = prefilled(sparse)
    with ThreadPoolExecutor(2) as pool:
        futures = {q: pool.submit(complete, sparse, q.prompt, next(new_salts), SURE_TOKENS) for q in alone.replies}
        together = {question: future.result() for question, future in futures.items()}
    for question, reply in together.items():
        assert question.answer in reply.text
        assert alone.replies[question].text.startswith(reply.text)
    # Prompts that share a chunk may leave a short rest of one of them, which runs dense.
    total = sum(reply.prompt_tokens for reply in together.values())
    assert total - CHUNK < prefilled(sparse).sparse - before.sparse <= total


def test_a_repeated_prompt_reuses_its_prefix_and_goes_on_the_same(sparse: Server) -> None:
    # What follows the two chunks is short and runs dense, the first time as well as the second.
    rest = MIN_CHUNK - 1
    prompt, salt = tokenize(sparse, GARDEN.prompt)[-2 * CHUNK - rest :], next(new_salts)
    first = complete(sparse, prompt, salt, SURE_TOKENS)
    before = prefilled(sparse)
    again = complete(sparse, prompt, salt, SURE_TOKENS)
    assert first.prompt_tokens == again.prompt_tokens == 2 * CHUNK + rest
    assert 0 < prefilled(sparse).tokens - before.tokens <= rest
    assert GARDEN.answer in first.text
    assert again.text == first.text


def test_decoding_after_a_sparse_prefill_streams_what_it_returns(sparse: Server, alone: Alone) -> None:
    pieces = stream(sparse, LIBRARY.prompt, next(new_salts), 24)
    assert len(pieces) > 10
    assert "".join(pieces) == alone.replies[LIBRARY].text


def test_with_the_full_budget_greedy_text_is_the_stock_backends(compared: tuple[FullBudget, list[Answer]]) -> None:
    full_budget, stock = compared
    assert full_budget.sparse_tokens == sum(reply.prompt_tokens for reply in full_budget.replies)
    for copy, ours, theirs in zip(COPIES, full_budget.replies, stock, strict=True):
        assert ours.text == theirs["text"]
        assert ours.text.startswith(copy.answer)
        # The kernels round differently, and 30 layers add that up.
        assert ours.first_logprob == pytest.approx(theirs["logprobs"][0], abs=0.05)


def test_another_plugin_on_our_backend_slot_is_reported_and_we_serve(compared: tuple[FullBudget, list[Answer]]) -> None:
    full_budget, _ = compared
    (line,) = {line[line.index("CUSTOM") :] for line in full_budget.log.splitlines() if "rival.Backend" in line}
    assert "MInference takes it over" in line
    assert "VLLM_PLUGINS" in line
    assert full_budget.sparse_tokens > 0


def test_a_server_salts_its_pages_and_reuses_them(compared: tuple[FullBudget, list[Answer]]) -> None:
    full_budget, _ = compared
    assert full_budget.reused_tokens > 0
    config = load_config({"minference": EVERY_KEY}, {})
    salt = salt_of(config, resolve(config.method, None))
    assert f"MInference: block hashes are salted with {salt[:16]}: " in full_budget.log


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unknown key", ["minference.min_seq_length is not a setting", "min_seq_len, min_chunk"]),
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
