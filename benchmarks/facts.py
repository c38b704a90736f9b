# SPDX-License-Identifier: Apache-2.0
"""Prompts that hide twenty facts in a text, ask for all of them at the end, and contain the answers.

How likely a model finds the tokens of the answers, given all that comes before, says more than whether it finds one
fact.
"""

import random
from typing import Any, NamedTuple

CITIES = (
    "Paris", "London", "Tokyo", "Delhi", "Cairo", "Lima", "Oslo", "Rome", "Madrid", "Berlin", "Vienna", "Prague",
    "Dublin", "Athens", "Lisbon", "Warsaw", "Sydney", "Boston", "Denver", "Quito",
)  # fmt: skip
OPENING = "Below is a long text. Some special magic numbers are hidden in it. Memorize them.\n\n"
FACT = "The special magic number for {city} is {number}"
QUESTION = "\n\nQuestion: What is the special magic number for {city} mentioned in the text?\nAnswer: "
QUESTIONS_TOKENS = 1300  # about as many as questions, answers and facts take
CHARACTERS_PER_TOKEN = 6  # more than most texts have on average; indented code may have more
PLACES = 20  # places of a text that are tried


class FactPrompt(NamedTuple):
    """One prompt.

    Attributes:
        tokens: of the opening, the text with the facts in it, questions and answers.
        text_end: the position at which the questions begin.
        answers: positions of the answers' tokens.
    """

    tokens: list[int]
    text_end: int
    answers: list[int]


def make_prompt(tokenizer: Any, text: str, tokens: int, seed: int) -> FactPrompt:
    """A prompt of about `tokens` tokens, from a random place of the first half of a text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: must be long enough.
        tokens: how long the prompt is to be, within a few percent.
        seed: of the place in the text, the facts and their places.
    """
    lots = random.Random(seed)
    numbers = draw_numbers(lots)
    prompt = encode(tokenizer, OPENING + hide(cut(tokenizer, text, tokens - QUESTIONS_TOKENS, lots), numbers, lots))
    text_end = len(prompt)
    return FactPrompt(prompt, text_end, ask(tokenizer, prompt, numbers, lots))


def encode(tokenizer: Any, part: str) -> list[int]:
    return list(tokenizer.encode(part, add_special_tokens=False))


def draw_numbers(lots: random.Random) -> dict[str, str]:
    """A number for each city."""
    return {city: str(lots.randrange(10**6, 10**7)) for city in CITIES}


def cut(tokenizer: Any, text: str, tokens: int, lots: random.Random) -> str:
    """A passage of `tokens` tokens, from a random place of the first half of a text.

    It ends less than `tokens` * CHARACTERS_PER_TOKEN characters after that half. A reader that keeps to what comes
    later, as benchmarks.search does, has therefore seen none of it.

    Raises:
        ValueError: no place was found that has so many tokens before that limit.
    """
    reach = len(text) // 2 + tokens * CHARACTERS_PER_TOKEN
    for _ in range(PLACES):  # the first place, unless it has too few tokens
        start = lots.randrange(len(text) // 2)
        body = begin(tokenizer, text[start:reach], tokens)
        if len(body) >= tokens:
            return str(tokenizer.decode(body))
    raise ValueError(f"the text has {len(body)} tokens from character {start} on; {tokens} are asked for")


def begin(tokenizer: Any, text: str, tokens: int) -> list[int]:
    """The first tokens of a text, as many as asked for; all, if it has fewer."""
    body: list[int] = []
    end = 0
    # Encodes no more of the text than needed. Do not change this: where the text is cut may change tokens, and the
    # prompts of earlier results must stay the same.
    while len(body) < tokens and end < len(text):
        end += tokens * CHARACTERS_PER_TOKEN
        body = encode(tokenizer, text[:end])
    return body[:tokens]


def hide(text: str, numbers: dict[str, str], lots: random.Random) -> str:
    """The text with a sentence for each city at random places."""
    sentences = text.split(". ")
    for city, number in numbers.items():
        sentences.insert(lots.randrange(len(sentences)), FACT.format(city=city, number=number))
    return ". ".join(sentences)


def ask(tokenizer: Any, prompt: list[int], numbers: dict[str, str], lots: random.Random) -> list[int]:
    """Append a question and its answer for each city, in random order; return the positions of the answers' tokens."""
    answers: list[int] = []
    for city in lots.sample(CITIES, len(CITIES)):
        prompt += encode(tokenizer, QUESTION.format(city=city))
        answer = encode(tokenizer, numbers[city])
        answers += range(len(prompt), len(prompt) + len(answer))
        prompt += answer
    return answers
