# SPDX-License-Identifier: Apache-2.0
"""Prompts: of the lengths asked for, of all texts in turns, and never the same words to search and to check with."""

import lzma
from pathlib import Path

import pytest

from minference_vllm.errors import ConfigError
from minference_vllm.search import prompts
from minference_vllm.search.prompts import load_texts, make, scored_from


class Bytes:
    """A tokenizer whose tokens are bytes."""

    start: tuple[int, ...] = ()

    def __init__(self, name: str) -> None:
        assert name == "a model"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Two texts, each of one letter in its first half and another in its second."""
    monkeypatch.setattr(prompts, "Tokenizer", Bytes)
    plain, packed = tmp_path / "plain.txt", tmp_path / "packed.txt.xz"
    plain.write_text("<" * 10_000 + ">" * 10_000)
    packed.write_bytes(lzma.compress(b"{" * 10_000 + b"}" * 10_000))
    return load_texts([plain, packed])


def letters(prompt: tuple[int, ...]) -> set[str]:
    """Of the texts, not of what is hidden in them and asked."""
    return {chr(token) for token in prompt} & set("<>{}")


def test_each_half_of_a_text_is_for_one_purpose(texts: dict[str, str]) -> None:
    made = make("a model", texts, [6000, 8000], 4, seed=0)
    assert [letters(prompt) for prompt in made.searching] == [{"<"}, {"{"}, {"<"}, {"{"}]
    assert [letters(prompt) for prompt in made.checking] == [{">"}, {"}"}, {">"}, {"}"}]
    for some in (made.searching, made.checking):
        assert [round(len(prompt), -2) for prompt in some] == [6000, 6000, 8000, 8000]


def test_prompts_differ_and_a_seed_gives_the_same_again(texts: dict[str, str]) -> None:
    first, again, other = (make("a model", texts, [6000], 4, seed).searching for seed in (0, 0, 100))
    assert first == again
    assert not set(first) & set(other)
    assert len(set(first)) == 4


def test_a_text_that_is_too_short_is_named_with_what_is_needed(texts: dict[str, str]) -> None:
    with pytest.raises(
        ConfigError, match=r"plain.txt has 20000 tokens\. .* prompts of 10001 take 20002: give a longer"
    ):
        make("a model", texts, [6000, 10_001], 2, seed=0)


def test_a_text_that_cannot_be_read_is_named_by_its_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--data .*none.txt cannot be read"):
        load_texts([tmp_path / "none.txt"])


def test_without_files_prompts_are_cut_from_pythons_library() -> None:
    [(name, text)] = load_texts([]).items()
    assert "without --data" in name
    assert "import argparse" in text
    assert len(text) > 10**6


@pytest.mark.parametrize(("length", "first"), [(28_672, 24_576), (8192, 4096), (1000, 500), (3, 2)])
def test_the_end_of_a_prompt_is_scored(length: int, first: int) -> None:
    assert scored_from((0,) * length) == first
