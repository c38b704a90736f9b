# SPDX-License-Identifier: Apache-2.0
"""What commands that compare a dense and a sparse server have in common: their options, and how they end."""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minference_vllm.cli.arguments import count_to
from minference_vllm.cli.status import FAILED, STOPPED
from minference_vllm.errors import ConfigError
from minference_vllm.evals.clock import now

MOST_SECONDS = 10**6


def add_options(command: Any, timeout_s: int, timed: str) -> Any:
    """Add the options that name the servers.

    Args:
        timeout_s: default of --timeout.
        timed: what --timeout limits.

    Returns:
        The group of these options, so that more can be added.
    """
    servers = command.add_argument_group("servers")
    servers.add_argument("--dense", metavar="URL", help="URL of a server with another attention backend")
    servers.add_argument("--sparse", metavar="URL", help="URL of a server with --attention-backend minference")
    servers.add_argument("--serve", metavar="OPTIONS", help="start both here, with these options of vllm serve")
    servers.add_argument(
        "--serve-sparse", metavar="OPTIONS", default="", help="--additional-config for the sparse one only"
    )
    command.set_defaults(control=None, serve_control="")  # a third server, for commands that add options for it
    servers.add_argument("--model", help="name of the model on the servers, or the model to --serve")
    servers.add_argument(
        "--timeout", type=count_to(MOST_SECONDS), default=timeout_s, help=f"seconds for {timed}; default: {timeout_s}"
    )
    return servers


def check(options: argparse.Namespace, without: bool = False, alternative: str = "", needs_model: bool = True) -> None:
    """Refuse options that contradict each other.

    Args:
        without: whether the command is to run without servers.
        alternative: how a message names the option for that.
        needs_model: whether the model must be named.

    Raises:
        ConfigError: they contradict each other, or one is missing.
    """
    urls, serves = bool(options.dense or options.sparse), options.serve is not None
    if urls + serves + without != 1 or bool(options.dense) != bool(options.sparse):
        raise ConfigError(f"Give --dense and --sparse, or --serve{alternative}.")
    for name, own in (("sparse", options.serve_sparse), ("control", options.serve_control)):
        if own and not serves:
            raise ConfigError(f"--serve-{name} adds to the options of --serve, which is not given.")
    if options.control and not options.dense:
        raise ConfigError("--control is the URL of a third server beside --dense and --sparse, which are not given.")
    if not without and not options.out:
        raise ConfigError("Give --out: the folder for what is measured and for the report.")
    if needs_model and not options.model:
        raise ConfigError("Give --model, the name that the servers have for it, or what --serve is to serve.")


def pair(options: argparse.Namespace) -> Any:
    """The servers that the options name."""
    from minference_vllm.evals import serve
    from minference_vllm.evals.servers import Pair, Role, Server

    def server(role: Role) -> Server:
        if options.serve is None:
            return Server(role, url=getattr(options, role).rstrip("/"))
        own = "" if role is Role.DENSE else getattr(options, f"serve_{role}")
        arguments = serve.arguments(options.model, options.serve, role is Role.DENSE, own, f"--serve-{role}")
        return Server(role, arguments=tuple(arguments))

    control = server(Role.CONTROL) if options.control or options.serve_control else None
    return Pair(server(Role.DENSE), server(Role.SPARSE), options.model, options.timeout, options.out, control)


def record() -> dict[str, str]:
    """What a report says of the command that made it."""
    from minference_vllm.evals.private import own_command

    return {
        "command": own_command(),
        "date": now(),
    }


def run(work: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a command's work and return the exit status. Servers that were started here are stopped on the way out."""
    from minference_vllm.evals.errors import ServerError  # none of this for --help

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        return work(options)
    except ServerError as error:
        print(f"{error}\nThe same command goes on where it was.", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("Stopped; the same command goes on where it was.", file=sys.stderr)
        return STOPPED


def say_end(report: dict[str, Any], page: Path) -> None:
    """Print where a report is, and what its reader must know beside its rows."""
    for note in report["notes"]:
        print(note)
    for warning in report["warnings"]:
        print(f"WARNING: {warning}")
    print(f"The report is {page}.")


def say_rows(rows: list[dict[str, Any]], shown: tuple[str, ...]) -> None:
    """Print what is shown of a report's rows as a table."""
    from minference_vllm.evals.document import cell

    lines = [list(shown), *([cell(row[name]) for name in shown] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
