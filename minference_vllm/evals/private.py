# SPDX-License-Identifier: Apache-2.0
"""Takes keys and passwords out of what is written into reports and logs, which are for others to read."""

import re
import shlex
import sys
from collections.abc import Iterator, Sequence

SECRET_OPTION = r"--(?:api[-_]k|hf[-_]t|header)[\w-]*"
"""Options of vllm serve and vllm bench serve, also when abbreviated; everything up to the next option is secret."""

WITHHELD = "***"
ALONE = re.compile(SECRET_OPTION)
WITHIN = re.compile(rf"({SECRET_OPTION})([=\s]+)(?:(?!\s-).)+", re.DOTALL)
OF_URL = re.compile(r"(\w+://)[^/?#\s]*@")


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """A command's arguments without secrets. An argument may hold several options itself."""
    return list(_shown(arguments))


def own_command() -> str:
    """The command line of this process, for records."""
    return shlex.join(["minference-vllm", *without_secrets(sys.argv[1:])])


def of_url(text: str) -> str:
    """A text without the user names and passwords in its URLs."""
    return OF_URL.sub(rf"\1{WITHHELD}@", text)


def _shown(arguments: Sequence[str]) -> Iterator[str]:
    is_secret = False
    for argument in arguments:
        if argument.startswith("-"):
            is_secret = ALONE.fullmatch(argument) is not None
        yield (
            WITHHELD if is_secret and not argument.startswith("-") else of_url(WITHIN.sub(rf"\1\2{WITHHELD}", argument))
        )
