# SPDX-License-Identifier: Apache-2.0
"""The command line, `minference-vllm COMMAND`: a module a command, each with `add_parser`."""

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
    """Run a command; the exit status, which is FAILED with a sentence where something given does not fit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold what no encoding has
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
    """The options of a command; `run` is its function."""
    parser = Parser(prog="minference-vllm", description="Tools around sparse prefill in vLLM.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser.parse_args(arguments)
