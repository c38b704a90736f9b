# SPDX-License-Identifier: Apache-2.0
"""What is raised to the user."""

from collections.abc import Callable
from typing import Any

LONGEST_INPUT = 80  # characters of a bad key or value that a message repeats


class ConfigError(ValueError):
    """A configuration that cannot be served; the message names the field, the value and what is allowed."""


def shortened(value: Any, write: Callable[[Any], str] = repr) -> str:
    """A key or value on one line, and not all of it if it is long."""
    try:
        text = " ".join(write(value).split())
    except (TypeError, ValueError, RecursionError):  # Python writes out no number of more than 4,300 digits
        return "a value that is too long to repeat"
    return text if len(text) <= LONGEST_INPUT else f"{text[:LONGEST_INPUT]}..."
