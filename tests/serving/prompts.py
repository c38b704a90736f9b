# SPDX-License-Identifier: Apache-2.0
"""The prompts of the serving tests: texts of 1,100 to 1,300 tokens whose next words the small model is sure of.

Where two tokens are about equally likely, the rounding of another kernel or chunk may swap them; the first 24 tokens
after COPIES, and the first six after the other prompts, lead by more than a factor of three.
"""

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


def ask(what: str, number: str, start: int) -> Question:
    """A fact in the middle of a text, and at its end the sentence that it completes."""
    sentence = f"The magic number of the {what} is"
    paragraphs = excerpt(start, 4_800).split("\n\n")
    paragraphs.insert(len(paragraphs) // 2, f"{sentence} {number}.")
    return Question("\n\n".join([*paragraphs, sentence]), number)


def begin_again(start: int) -> Question:
    """A text, and after it its own first paragraphs up to the middle of a sentence: it goes on as it did before."""
    text = excerpt(start, 3_800)
    end = text.index(" ", 900)
    return Question(f"{text}\n\n{text[:end]}", text[end : end + 40])


LIBRARY = ask("library", "7421", 0)
GARDEN = ask("garden", "3856", 9_000)
COPIES = [begin_again(start) for start in (3_000, 9_000, 12_000)]
