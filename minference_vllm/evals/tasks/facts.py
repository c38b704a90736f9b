# SPDX-License-Identifier: Apache-2.0
"""facts: twenty facts hidden in the user's text, all asked for at its end, the answers given.

The model generates nothing. Instead, each token of the given answers is checked: is it what the model would have said?
A prompt thus gives some hundred decisions instead of one, so that small losses show.
"""

import random

from minference_vllm.evals.material import SLACK, Material, Tokenizer, check_room
from minference_vllm.evals.sample import Kind, Sample

CITIES = (
    "Paris", "London", "Tokyo", "Delhi", "Cairo", "Lima", "Oslo", "Rome", "Madrid", "Berlin", "Vienna", "Prague",
    "Dublin", "Athens", "Lisbon", "Warsaw", "Sydney", "Boston", "Denver", "Quito",
)  # fmt: skip
OPENING = "Below is a long text. Some special magic numbers are hidden in it. Memorize them.\n\n"
FACT = " The special magic number for {city} is {number}. "
QUESTION = "\n\nQuestion: What is the special magic number for {city} mentioned in the text?\nAnswer: "


def make(material: Material, tokens: int, samples: int) -> list[Sample]:
    """Facts and their places differ from sample to sample."""
    return [_make(material, tokens, index) for index in range(samples)]


def _make(material: Material, tokens: int, index: int) -> Sample:
    lots, tokenizer = material.lots("facts", tokens, index), material.tokenizer
    numbers = {city: str(lots.randrange(10**6, 10**7)) for city in CITIES}
    ending, answers = _questions(tokenizer, numbers, lots)
    opening = [*tokenizer.start, *tokenizer.encode(OPENING)]
    hidden = [tokenizer.encode(FACT.format(city=city, number=number)) for city, number in numbers.items()]
    room = tokens - SLACK - len(opening) - len(ending) - sum(map(len, hidden))
    check_room("facts", tokens, room, least=len(hidden))
    text = material.passage(room, lots)
    # From the last place to the first, so that earlier places stay valid while facts are inserted.
    for place, fact in zip(sorted(lots.sample(range(room), len(hidden)), reverse=True), hidden, strict=True):
        text[place:place] = fact
    prompt = opening + text
    return Sample(
        task="facts",
        tokens=tokens,
        index=index,
        kind=Kind.FIRST_CHOICE,
        max_tokens=1,
        prompt=(*prompt, *ending),
        answers=tuple(len(prompt) + at for at in answers),
    )


def _questions(tokenizer: Tokenizer, numbers: dict[str, str], lots: random.Random) -> tuple[list[int], list[int]]:
    """A question and its answer for each city, in random order, and where the answers' tokens are in them."""
    tokens: list[int] = []
    answers: list[int] = []
    for city in lots.sample(CITIES, len(CITIES)):
        tokens += tokenizer.encode(QUESTION.format(city=city))
        answer = tokenizer.encode(numbers[city])
        answers += range(len(tokens), len(tokens) + len(answer))
        tokens += answer
    return tokens, answers
