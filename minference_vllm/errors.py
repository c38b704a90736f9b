# SPDX-License-Identifier: Apache-2.0
"""The exception that reports a bad configuration to the user, and how its message is made fit to print."""

from collections.abc import Callable
from typing import Any

LONGEST_INPUT = 80  # characters of a bad key or value that a message repeats
LONGEST_MESSAGE = 4000  # characters
LAST_WORDS = 1000  # characters kept from the end of a longer message, where it says what to do


class ConfigError(ValueError):
    """A configuration that cannot be served; the message names the field, the value and what is allowed.

    The message is one line of printable characters, whatever keys, values, paths or messages of other programs it
    quotes, so any terminal and log can show it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_cut(printable(message)))


def printable(text: str) -> str:
    """Text on one line. Characters that cannot be printed become escapes: a terminal could take them for commands."""
    line = " ".join(text.splitlines())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def shortened(value: Any, write: Callable[[Any], str] = repr) -> str:
    """A key or value on one line, and not all of it if it is long."""
    try:
        text = printable(" ".join(write(value).split()))
    except (TypeError, ValueError, RecursionError):  # Python writes out no number of more than 4,300 digits
        return "a value that is too long to repeat"
    return text if len(text) <= LONGEST_INPUT else f"{text[:LONGEST_INPUT]}..."


def _cut(text: str) -> str:
    if len(text) <= LONGEST_MESSAGE:
        return text
    gap = " ... "
    return f"{text[: LONGEST_MESSAGE - LAST_WORDS - len(gap)]}{gap}{text[-LAST_WORDS:]}"
