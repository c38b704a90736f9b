# SPDX-License-Identifier: Apache-2.0
"""Prompts made to mislead any choice of keys: what matters lies far back, and only part of a chunk needs it."""

import random
from collections.abc import Callable
from typing import Any

from benchmarks.facts import OPENING, QUESTIONS_TOKENS, FactPrompt, ask, cut, draw_numbers, encode, hide

PASSAGE_TOKENS = 800
TRIES = 50
OVERLAP = 100  # characters: no two places of a text have so many in common
PASSAGE_SEEN = 64  # tokens of the copy after which a model can recognise it

Trap = Callable[[Any, list[str], int, int], FactPrompt]
"""Makes a prompt from a tokenizer, two texts, the number of tokens and a seed."""


def asked_in_the_middle(tokenizer: Any, texts: list[str], tokens: int, seed: int) -> FactPrompt:
    """Facts in the first half, then questions and answers; after them the text goes on, in rows that need no facts."""
    lots = random.Random(seed)
    numbers = draw_numbers(lots)
    half = (tokens - QUESTIONS_TOKENS) // 2
    prompt = encode(tokenizer, OPENING + hide(cut(tokenizer, texts[0], half, lots), numbers, lots))
    text_end = len(prompt)
    answers = ask(tokenizer, prompt, numbers, lots)
    prompt += encode(tokenizer, "\n\n" + cut(tokenizer, texts[0], half, lots))
    return FactPrompt(prompt, text_end, answers)


def copied(tokenizer: Any, texts: list[str], tokens: int, seed: int) -> FactPrompt:
    """A passage from the prompt's beginning, after its first tenth, comes again word for word within a later chunk."""
    lots = random.Random(seed)
    size = min(PASSAGE_TOKENS, tokens // 8)
    passage = cut(tokenizer, texts[0], size, lots)
    before, between, after = (
        encode(tokenizer, cut_elsewhere(tokenizer, texts[0], tokens * tenths // 10, lots, passage))
        for tenths in (1, 5, 3)
    )
    prompt = before + encode(tokenizer, passage) + between
    text_end = len(prompt)
    prompt += encode(tokenizer, passage)
    answers = list(range(text_end + PASSAGE_SEEN, len(prompt)))
    return FactPrompt(prompt + after, text_end, answers)


def cut_elsewhere(tokenizer: Any, text: str, tokens: int, lots: random.Random, passage: str) -> str:
    """Tokens of a text that do not contain the passage, because its copy would otherwise have a nearer source."""
    for _ in range(TRIES):
        part = cut(tokenizer, text, tokens, lots)
        if passage[:OVERLAP] not in part and passage[-OVERLAP:] not in part:
            return part
    raise ValueError(f"{TRIES} cuts of {tokens} tokens all held the passage: the text is short, or repeats itself")


def changed_half_way(tokenizer: Any, texts: list[str], tokens: int, seed: int) -> FactPrompt:
    """The first half, which holds the facts, is of one kind of text, the second of another; asked at the end."""
    lots = random.Random(seed)
    numbers = draw_numbers(lots)
    half = (tokens - QUESTIONS_TOKENS) // 2
    prompt = encode(tokenizer, OPENING + hide(cut(tokenizer, texts[0], half, lots), numbers, lots))
    prompt += encode(tokenizer, "\n\n" + cut(tokenizer, texts[1], half, lots))
    text_end = len(prompt)
    return FactPrompt(prompt, text_end, ask(tokenizer, prompt, numbers, lots))


TRAPS: dict[str, Trap] = {
    "asked in the middle": asked_in_the_middle,
    "a copied passage": copied,
    "another kind of text half-way": changed_half_way,
}
