# SPDX-License-Identifier: Apache-2.0
"""Engines that are up at the same time, each in a process of its own, and take requests in turns.

Then they share the GPU's clock and temperature, which change within minutes by more than some of the differences that
are to be measured.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from typing import Any

from benchmarks import ENVIRON

Start = Callable[[str, dict[str, Any]], Callable[[Any], Any]]


class EngineProcess:
    """A process that holds one engine, in a `with` statement.

    Args:
        module: a benchmark whose main() begins with `serve_requests`.
        kind: which engine.
        spec: what it is told, as JSON.
    """

    def __init__(self, module: str, kind: str, spec: dict[str, Any]) -> None:
        self.kind = kind
        self._connection, theirs = Pipe()
        command = [sys.executable, "-m", module, "--serve", kind, "--connection", str(theirs.fileno())]
        self._process = subprocess.Popen(command, env={**os.environ, **ENVIRON}, pass_fds=[theirs.fileno()])
        theirs.close()
        self.ask(spec)

    def ask(self, request: Any) -> Any:
        """What the engine answers.

        Raises:
            SystemExit: its process has ended.
        """
        try:
            self._connection.send_bytes(json.dumps(request).encode())
            return json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError):
            status = self._process.wait()
            sys.exit(f"The {self.kind} engine ended with status {status}; its output above says why.")

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.wait()


def serve_requests(start: Start) -> bool:
    """In the process of an EngineProcess: answer requests until there are no more, return True.

    Args:
        start: makes an engine of a kind and a spec, and gives what answers a request.
    """
    if "--serve" not in sys.argv:
        return False
    parser = argparse.ArgumentParser()
    parser.add_argument("--serve", required=True)
    parser.add_argument("--connection", type=int, required=True)
    options = parser.parse_args()
    with Connection(options.connection) as connection:
        answer: Callable[[Any], Any] | None = None
        while True:
            try:
                request = json.loads(connection.recv_bytes())
            except EOFError:
                return True
            if answer is None:
                answer, reply = start(options.serve, request), None
            else:
                reply = answer(request)
            connection.send_bytes(json.dumps(reply).encode())
