# SPDX-License-Identifier: Apache-2.0
"""Prompts to search with and others to check with: the user's texts, with facts hidden in them, asked for at the end.

Plain text can be predicted from nearby tokens. Questions at the end make the next tokens depend on the whole prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minference_vllm.errors import ConfigError
from minference_vllm.evals.material import Material, Tokenizer, load_text
from minference_vllm.evals.tasks import facts

SCORED = 4096
"""Tokens at a prompt's end whose prediction counts: some text, all questions and answers. At most half a prompt."""

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prompts:
    """Tokens of prompts.

    Attributes:
        searching: from the first half of each text.
        checking: from the second.
    """

    searching: tuple[Prompt, ...]
    checking: tuple[Prompt, ...]


def make(model: str, data: Sequence[Path], lengths: Sequence[int], count: int, seed: int) -> Prompts:
    """`count` prompts to search with and as many to check with, taken from all texts and lengths in turn.

    Raises:
        ConfigError: a text cannot be read or is too short, or the model has no tokenizer.
    """
    tokenizer = Tokenizer(model)
    halves: list[tuple[list[int], list[int]]] = []
    for path in data:
        tokens = tokenizer.encode(load_text(path, option="--data"))
        middle = len(tokens) // 2
        if middle < max(lengths):
            raise ConfigError(
                f"--data {path} has {len(tokens)} tokens. Half of it is searched with and half checked with, so that "
                f"prompts of {max(lengths)} take {2 * max(lengths)}: give a longer text, or less --tokens."
            )
        halves.append((tokens[:middle], tokens[middle:]))

    def cut(half: int, number: int) -> Prompt:
        turn, text = divmod(number, len(data))
        material = Material(tokenizer, model, halves[text][half], seed=seed + number)
        [sample] = facts.make(material, lengths[turn % len(lengths)], 1)
        assert not isinstance(sample.prompt, str)
        return sample.prompt

    searching, checking = (tuple(cut(half, number) for number in range(count)) for half in (0, 1))
    return Prompts(searching, checking)


def scored_from(prompt: Prompt) -> int:
    """The position of the first token whose prediction counts."""
    return len(prompt) - min(SCORED, len(prompt) // 2)
