# SPDX-License-Identifier: Apache-2.0
"""Prompts to search with and others to check with: texts with facts hidden in them, all asked for at the end.

Plain text can be predicted from nearby tokens. Questions at the end make the next tokens depend on the whole prompt.
"""

import sysconfig
from collections.abc import Mapping, Sequence
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


def load_texts(data: Sequence[Path]) -> dict[str, str]:
    """The texts of these files, by names for the user; without files, the sources of Python's library.

    Raises:
        ConfigError: a file cannot be read.
    """
    if not data:
        return {"Python's library, the text without --data,": load_library()}
    return {f"--data {path}": load_text(path, option="--data") for path in data}


def load_library() -> str:
    """The sources of Python's library as installed here, in alphabetical order: a long text that every machine has."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n\n".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.py")))


def make(model: str, texts: Mapping[str, str], lengths: Sequence[int], count: int, seed: int) -> Prompts:
    """`count` prompts to search with and as many to check with, taken from all texts and lengths in turn.

    Raises:
        ConfigError: a text is too short, or the model has no tokenizer.
    """
    tokenizer = Tokenizer(model)
    halves: list[tuple[list[int], list[int]]] = []
    for name, text in texts.items():
        tokens = tokenizer.encode(text)
        middle = len(tokens) // 2
        if middle < max(lengths):
            raise ConfigError(
                f"{name} has {len(tokens)} tokens. Half of it is searched with and half checked with, so that "
                f"prompts of {max(lengths)} take {2 * max(lengths)}: give a longer text, or less --tokens."
            )
        halves.append((tokens[:middle], tokens[middle:]))

    def cut(half: int, number: int) -> Prompt:
        turn, text = divmod(number, len(halves))
        material = Material(tokenizer, model, halves[text][half], seed=seed + number)
        [sample] = facts.make(material, lengths[turn % len(lengths)], 1)
        assert not isinstance(sample.prompt, str)
        return sample.prompt

    searching, checking = (tuple(cut(half, number) for number in range(count)) for half in (0, 1))
    return Prompts(searching, checking)


def scored_from(prompt: Prompt) -> int:
    """The position of the first token whose prediction counts."""
    return len(prompt) - min(SCORED, len(prompt) // 2)
