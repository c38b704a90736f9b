# SPDX-License-Identifier: Apache-2.0
"""Long prompts from a plain text: with a fact hidden in it, or with a passage of it beginning again at the end."""

import argparse
import json
import lzma
import random
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

CITIES = (
    "Amsterdam", "Athens", "Bangkok", "Barcelona", "Berlin", "Bogota", "Boston", "Brisbane", "Brussels", "Budapest",
    "Cairo", "Calgary", "Caracas", "Chicago", "Copenhagen", "Dakar", "Delhi", "Dublin", "Geneva", "Hanoi", "Havana",
    "Helsinki", "Istanbul", "Jakarta", "Karachi", "Kyoto", "Lagos", "Lima", "Lisbon", "Madrid", "Manila", "Melbourne",
    "Mumbai", "Nairobi", "Oslo", "Ottawa", "Prague", "Quito", "Riga", "Rome", "Santiago", "Seoul", "Singapore", "Sofia",
    "Stockholm", "Tallinn", "Tokyo", "Toronto", "Vienna", "Warsaw",
)  # fmt: skip
NEEDLE = " The special magic number for {city} is: {number}. "
QUESTION = (
    "What is the special magic number for {city} that the text above mentions? Answer with the number and nothing else."
)
SENTENCE_REACH = 200
"""Tokens before the wanted depth in which the end of a sentence is searched for."""

BODY_MARK = "<<the text>>"


class Needle(NamedTuple):
    """A prompt that asks for a fact in it."""

    prompt: list[int]
    answer: str
    depth: float


class Haystack:
    """The tokens of a text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        text: long enough for the longest prompt.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = self._encode(text)

    def needle(self, tokens: int, depth: float, rng: random.Random) -> Needle:
        """A prompt of exactly `tokens` tokens, cut at a random place of the text.

        Args:
            depth: where the fact lies: 0 the beginning of the text, 1 its end.
        """
        city, number = rng.choice(CITIES), str(rng.randrange(1_000_000, 10_000_000))
        before, after = self._chat(f"{BODY_MARK}\n\n{QUESTION.format(city=city)}")
        needle = self._encode(NEEDLE.format(city=city, number=number))
        body = self.passage(tokens - len(before) - len(needle) - len(after), rng)
        at = self._sentence_end(body, round(depth * len(body)))
        return Needle([*before, *body[:at], *needle, *body[at:], *after], number, depth)

    def echo(self, tokens: int, cue: int, rng: random.Random) -> list[int]:
        """A prompt of exactly `tokens` tokens, the last `cue` of which repeat a passage from somewhere in it.

        A model that sees the whole prompt goes on with what followed that passage, and hardly hesitates.
        """
        break_ = self._encode("\n\n")
        body = self.passage(tokens - cue - len(break_), rng)
        room = len(body) - 4 * cue  # leaves room after the passage, so that what follows it is no part of the cue
        if room <= 0:
            raise ValueError(f"a prompt of {tokens} tokens is too short to repeat {cue} of them.")
        at = rng.randrange(room)
        return [*body, *break_, *body[at : at + cue]]

    def passage(self, tokens: int, rng: random.Random) -> list[int]:
        """That many tokens from a random place of the text."""
        if not 0 < tokens <= len(self._tokens):
            raise ValueError(f"{tokens} tokens of a text that has {len(self._tokens)}: take a longer text.")
        start = rng.randrange(len(self._tokens) - tokens + 1)
        return self._tokens[start : start + tokens]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _chat(self, content: str) -> tuple[list[int], list[int]]:
        """The tokens of a user's message before and after BODY_MARK."""
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        before, after = text.split(BODY_MARK)
        return self._encode(before), self._encode(after)

    def _sentence_end(self, body: list[int], wanted: int) -> int:
        for at in range(wanted, max(wanted - SENTENCE_REACH, 0), -1):
            if self._tokenizer.decode(body[at - 1 : at]).rstrip().endswith((".", "!", "?")):
                return at
        return wanted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="an instruction-tuned model, as vLLM takes it")
    parser.add_argument("--haystack", type=Path, required=True, help="a plain text in UTF-8, or one compressed by xz")


def identify(options: argparse.Namespace) -> dict[str, Any]:
    """What identifies the text and the model on record, because a path says little to others."""
    found = {"haystack": options.haystack.name, "haystack_sha256": sha256(options.haystack.read_bytes()).hexdigest()}
    config = Path(options.model, "config.json")
    return found | ({"model": json.loads(config.read_text())} if config.exists() else {})


def identify_model(folder: str) -> dict[str, str]:
    """What identifies a model on one line of the record: its folder's name and the hash of its config.json.

    Raises:
        SystemExit: it is no model's folder.
    """
    config = Path(folder, "config.json")
    if not config.is_file():
        raise SystemExit(f"{folder} holds no config.json: name a model's folder")
    return {"name": config.absolute().parent.name, "config_sha256": sha256(config.read_bytes()).hexdigest()}


def load(options: argparse.Namespace) -> Haystack:
    from transformers import AutoTokenizer

    raw = options.haystack.read_bytes()
    text = (lzma.decompress(raw) if options.haystack.suffix == ".xz" else raw).decode()
    return Haystack(AutoTokenizer.from_pretrained(options.model), text)
