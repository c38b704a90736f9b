# SPDX-License-Identifier: Apache-2.0
"""What the commands' options take."""

import argparse


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)
