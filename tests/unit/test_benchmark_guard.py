# SPDX-License-Identifier: Apache-2.0
"""The prompts and the chunk of the guard's benchmark are what they are said to be."""

import random

import pytest
import torch

from benchmarks import far_rows
from benchmarks.facts import FactPrompt, make_prompt
from benchmarks.traps import PASSAGE_SEEN, TRAPS, copied
from minference_vllm.reference.pages import gather

TOKENS = 9000
WORDS = random.Random(0)
TEXTS = [
    " ".join(f"{WORDS.choice(words)} {WORDS.randrange(999)}." for _ in range(9000)) for words in ("abcde", "vwxyz")
]


class Letters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(map(ord, text))

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


def text_of(tokens: list[int]) -> str:
    return Letters().decode(tokens)


def check_answers(prompt: FactPrompt) -> None:
    """Every answer is a number that the text before the questions holds in one sentence."""
    answers = text_of([prompt.tokens[place] for place in prompt.answers])
    before = text_of(prompt.tokens[: prompt.text_end])
    assert len(answers) == 20 * 7
    for start in range(0, len(answers), 7):
        assert before.count(f" is {answers[start : start + 7]}") == 1


def test_facts_are_hidden_once_and_asked_for_at_the_end() -> None:
    prompt = make_prompt(Letters(), TEXTS[0], TOKENS, 1)
    check_answers(prompt)
    assert prompt.answers[-1] == len(prompt.tokens) - 1
    assert prompt == make_prompt(Letters(), TEXTS[0], TOKENS, 1)
    assert prompt != make_prompt(Letters(), TEXTS[0], TOKENS, 2)


@pytest.mark.parametrize("name", TRAPS)
def test_each_trap_has_its_answers_after_its_text(name: str) -> None:
    prompt = TRAPS[name](Letters(), TEXTS, TOKENS, 1)
    assert prompt.text_end < prompt.answers[0] <= prompt.answers[-1] < len(prompt.tokens)
    if TRAPS[name] is not copied:
        check_answers(prompt)


def test_what_is_asked_in_the_middle_is_followed_by_text() -> None:
    prompt = TRAPS["asked in the middle"](Letters(), TEXTS, TOKENS, 1)
    assert len(prompt.tokens) - prompt.answers[-1] > TOKENS // 3


def test_a_text_that_repeats_itself_makes_no_trap_of_a_copy() -> None:
    with pytest.raises(ValueError, match="repeats itself"):
        copied(Letters(), ["It was a day like any other. " * 2000], TOKENS, 1)


def test_the_copy_is_a_passage_from_far_before() -> None:
    prompt = copied(Letters(), ["".join(map(chr, range(1000, 30_000)))], TOKENS, 1)
    copy = [prompt.tokens[place] for place in prompt.answers]
    first = prompt.tokens.index(copy[0])
    assert prompt.tokens[first : first + len(copy)] == copy
    assert first < TOKENS // 4
    assert prompt.answers[0] == prompt.text_end + PASSAGE_SEEN


def test_far_rows_look_far_in_every_second_head_and_all_else_looks_near_by() -> None:
    chunk, middle = far_rows.make_chunk(2048, 1024, 0, torch.device("cpu"))
    keys, _ = gather(chunk.kv, chunk.seq_len)
    for head in (0, 1):
        scores = chunk.q[:, head].float() @ keys[head // chunk.group_size].float().T * chunk.scale
        position = torch.arange(chunk.context_len, chunk.seq_len)[:, None] - torch.arange(chunk.seq_len)
        attention = scores.masked_fill(position < 0, -torch.inf).softmax(-1)
        nearby = (attention * (position < 128)).sum(-1)
        far = torch.zeros(chunk.num_rows, dtype=torch.bool)
        far[middle] = head % 2 == 0
        assert (nearby[far] < 0.1).all()
        assert (nearby[~far] > 0.9).all()
        first_half = attention[far, : chunk.context_len // 2].sum(-1)
        assert (first_half > 0.9).all()


def test_without_the_guard_columns_and_diagonals_lose_the_far_rows_and_with_it_none() -> None:
    method = {"name": "vertical_slash", "vertical_size": 40, "slash_size": 100}
    off = {"recall_floor": 0.0, "row_recall_floor": 0.0}
    unguarded = far_rows.measure({"method": method, **off}, 2048, 1024, 0)
    guarded = far_rows.measure({"method": method}, 2048, 1024, 0)
    assert unguarded["answers_sparse"] < 0.5
    assert guarded["answers_sparse"] == 1
    assert guarded["redone"] > 0
