# SPDX-License-Identifier: Apache-2.0
"""Parsers for the values of the commands' options."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

from minference_vllm.errors import LONGEST_MESSAGE, ConfigError, printable, shortened
from minference_vllm.files import parse_json
from minference_vllm.methods.base import MAX_TOKENS


class Parser(argparse.ArgumentParser):
    """Reports a fault in one line, which repeats only the beginning of a long input."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message)[:LONGEST_MESSAGE])


def count_to(most: int, least: int = 1) -> Callable[[str], int]:
    """A parser of whole numbers in plain digits, from `least` to `most`."""

    def count(text: str) -> int:
        is_number = text.isascii() and text.isdecimal() and len(text) <= len(str(most))
        if not is_number or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{shortened(text)} is no whole number from {least} to {most}")
        return int(text)

    return count


count = count_to(MAX_TOKENS)


def json_object(option: str, text: str) -> dict[str, Any]:
    """The JSON object that an option was given.

    Raises:
        ConfigError: the option was given something else.
    """
    value = parse_json(text, option)
    if not isinstance(value, dict):
        raise ConfigError(f"{option} must be a JSON object, and is {type(value).__name__}.")
    return value
