# SPDX-License-Identifier: Apache-2.0
"""The command line, `minference-vllm COMMAND`. Each command is a module with `add_parser`."""

import argparse
import io
import sys
from collections.abc import Sequence

from minference_vllm.cli import bench, doctor, evaluate, patterns, plot, search, tune
from minference_vllm.cli.arguments import Parser
from minference_vllm.cli.status import FAILED, STOPPED
from minference_vllm.errors import ConfigError

COMMANDS = (tune, doctor, evaluate, bench, patterns, search, plot)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: FAILED, after a sentence on stderr, where an input does not fit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold bytes that are no text
    options = parse(arguments)
    try:
        return int(options.run(options))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return STOPPED


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command; their attribute `run` is the command's function."""
    parser = Parser(prog="minference-vllm", description="Tools around sparse prefill in vLLM.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser.parse_args(arguments)
