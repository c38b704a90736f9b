# SPDX-License-Identifier: Apache-2.0
"""The prompts of benchmarks.facts stay the same, so that results stay comparable, and few characters are enough."""

import json
import os
import random
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from benchmarks.facts import CHARACTERS_PER_TOKEN, FactPrompt, cut, make_prompt
from benchmarks.results import ROOT
from tests.conftest import import_or_skip

TEXT = (ROOT / "demo" / "haystack.txt").read_text()
MODEL = Path(os.environ.get("MINFERENCE_TEST_MODEL", ROOT / "models" / "SmolLM2-135M-Instruct"))


class Words:
    """A tokenizer whose tokens are words: spaces between them cost nothing, however many."""

    def encode(self, text: str, add_special_tokens: bool) -> list[str]:
        return text.split()

    def decode(self, tokens: list[str]) -> str:
        return " ".join(tokens)


class Letters:
    """A tokenizer whose tokens are characters."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(map(ord, text))

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


def hashed(prompt: FactPrompt) -> str:
    return sha256(json.dumps(prompt).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("tokens", "seed", "expected"),
    [(2048, 0, "031cac27c2a0bc00"), (4096, 1, "79b08d5338c90608"), (8192, 2, "fd2fd7fc0eae1a35")],
)
def test_prompts_are_those_of_earlier_results(tokens: int, seed: int, expected: str) -> None:
    assert hashed(make_prompt(Letters(), TEXT, tokens, seed)) == expected


@pytest.mark.skipif(not (MODEL / "tokenizer.json").exists(), reason="needs the tokenizer of SmolLM2-135M-Instruct")
@pytest.mark.skipif(MODEL.name != "SmolLM2-135M-Instruct", reason="another model has other tokens")
@pytest.mark.parametrize(
    ("tokens", "seed", "expected"),
    [
        (1500, 0, "f532d13448af4c56"),
        (2048, 3, "0749bb91313a2eb5"),
        (4096, 0, "e515829bc6e06675"),
        (4096, 1, "5988479769d0f109"),
    ],
)
def test_prompts_of_a_real_tokenizer_are_too(tokens: int, seed: int, expected: str) -> None:
    import_or_skip("transformers")
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    assert hashed(make_prompt(tokenizer, TEXT, tokens, seed)) == expected


@pytest.mark.parametrize("width", [1, CHARACTERS_PER_TOKEN, 3 * CHARACTERS_PER_TOKEN])
def test_a_text_of_few_tokens_a_character_is_cut_as_long(width: int) -> None:
    text = "".join(f"{number:>{width}} " for number in range(3000))
    found = cut(Words(), text, 1000, random.Random(0)).split()
    assert len(found) == 1000
    assert list(map(int, found[1:])) == list(range(int(found[1]), int(found[1]) + 999))  # the first may be cut


def test_no_prompt_reaches_what_is_searched() -> None:
    # benchmarks.search takes what is behind the first half by more than a prompt's characters.
    text = "".join(f"{number:>19} " for number in range(3000))
    for seed in range(50):
        found = cut(Words(), text, 1000, random.Random(seed)).split()
        assert len(found) == 1000
        assert 20 * (int(found[-1]) + 1) <= len(text) // 2 + 1000 * CHARACTERS_PER_TOKEN


def test_a_text_that_ends_too_soon_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the text has \d+ tokens from character \d+ on; 1000 are asked for"):
        cut(Words(), "a word " * 500, 1000, random.Random(0))


def test_a_prompt_that_is_all_questions_holds_no_text() -> None:
    for seed in range(20):
        assert cut(Letters(), TEXT, -300, random.Random(seed)) == ""
