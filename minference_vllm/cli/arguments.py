# SPDX-License-Identifier: Apache-2.0
"""What the commands' options take."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from minference_vllm.errors import LONGEST_MESSAGE, ConfigError, printable, shortened
from minference_vllm.files import parse_json
from minference_vllm.methods.base import MAX_TOKENS


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, not all of which is what was given."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message)[:LONGEST_MESSAGE])


def count_to(most: int, least: int = 1) -> Callable[[str], int]:
    """Takes a whole number in plain digits."""

    def count(text: str) -> int:
        is_number = text.isascii() and text.isdecimal() and len(text) <= len(str(most))
        if not is_number or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{shortened(text)} is no whole number from {least} to {most}")
        return int(text)

    return count


count = count_to(MAX_TOKENS)


def json_object(option: str, text: str) -> dict[str, Any]:
    """What an option takes as a JSON object.

    Raises:
        ConfigError: it was given something else.
    """
    value = parse_json(text, option)
    if not isinstance(value, dict):
        raise ConfigError(f"{option} must be a JSON object, and is {type(value).__name__}.")
    return value
