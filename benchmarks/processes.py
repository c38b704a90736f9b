# SPDX-License-Identifier: Apache-2.0
"""Every engine in a process of its own: one after the other, or several that take requests in turns.

Engines that are up at the same time share the GPU's clock and temperature, which change within minutes by more than
some of the differences that are to be measured.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any

from benchmarks import DENSE, SPARSE

# A worker must reach into its engine, and nothing of it may outlive the measurement.
ENVIRON = {
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

Start = Callable[[str, dict[str, Any]], Callable[[Any], Any]]
Worker = Callable[[str, dict[str, Any]], dict[str, Any]]


class EngineProcess:
    """A process that holds one engine, in a `with` statement.

    Args:
        module: a benchmark whose main() begins with `serve_requests` or `serve_worker`.
        kind: which engine.
        spec: what it is told, as JSON.
    """

    def __init__(self, module: str, kind: str, spec: dict[str, Any]) -> None:
        self.kind = kind
        self._module = module
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
            sys.exit(f"The {self.kind} engine of {self._module} ended with status {status}; its output above says why.")

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


def measure(module: str, spec: dict[str, Any], kinds: Sequence[str] = (SPARSE, DENSE)) -> dict[str, dict[str, Any]]:
    """What the worker of each kind finds, by kind; one after the other, for each wants the whole GPU.

    Args:
        module: a benchmark whose main() begins with `serve_worker`.
        spec: what every worker is told, as JSON.
        kinds: names of the workers.
    """
    found = {}
    for kind in kinds:
        print(f"==> {kind}", flush=True)
        start = time.monotonic()
        with EngineProcess(module, kind, spec) as engine:
            found[kind] = engine.ask(None)
        print(f"==> {kind} took {time.monotonic() - start:.0f} s", flush=True)
    return found


def serve_worker(worker: Worker) -> bool:
    """In a process that `measure` started: run the worker, hand over what it found, return True."""

    def start(kind: str, spec: dict[str, Any]) -> Callable[[Any], Any]:
        found = worker(kind, spec)
        return lambda _: found

    return serve_requests(start)
