# SPDX-License-Identifier: Apache-2.0
"""What the servers are asked: excerpts of a novel, 2,500 to 3,500 tokens long, with and without something to find."""

from pathlib import Path
from typing import NamedTuple

HAYSTACK = (Path(__file__).parents[2] / "demo" / "haystack.txt").read_text().strip()


class Question(NamedTuple):
    prompt: str
    answer: str


def excerpt(start: int, length: int) -> str:
    """Whole paragraphs of the novel, from about one character position on."""
    paragraphs, size = [], 0
    for paragraph in HAYSTACK[start:].split("\n\n")[1:]:
        if size > length:
            break
        paragraphs.append(paragraph)
        size += len(paragraph) + 2
    return "\n\n".join(paragraphs)


def hide(fact: str, text: str) -> str:
    """The text with one more paragraph in its middle."""
    paragraphs = text.split("\n\n")
    paragraphs.insert(len(paragraphs) // 2, fact)
    return "\n\n".join(paragraphs)


def ask(what: str, number: str, start: int) -> Question:
    text = hide(f"The magic number of the {what} is {number}.", excerpt(start, 11_000))
    return Question(f"{text}\n\nWhat is the magic number of the {what}? Answer with the number only.", number)


LIBRARY = ask("library", "7421", 0)
GARDEN = ask("garden", "3856", 9_000)
TEXTS = [excerpt(0, 10_000), excerpt(6_000, 12_000), excerpt(11_000, 11_000)]
