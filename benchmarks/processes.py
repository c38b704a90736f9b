# SPDX-License-Identifier: Apache-2.0
"""Every engine in a process of its own: one after the other, or several that take requests in turns.

Engines that run at the same time share the GPU's clock and temperature. These change within minutes, by more than some
of the differences that are to be measured.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, NoReturn

from benchmarks import DENSE, SPARSE
from minference_vllm.evals.serve import HOST, free_port

# A worker must be able to reach into its engine, and nothing of the engine may outlive the measurement.
ENVIRON = {
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

Start = Callable[[str, dict[str, Any]], Callable[[Any], Any]]
Worker = Callable[[str, dict[str, Any]], dict[str, Any]]


class EngineProcess:
    """A process that holds one engine, in a `with` statement; or a process for each GPU of a tensor-parallel engine.

    Args:
        module: a benchmark whose main() begins with `serve_requests` or `serve_worker`.
        kind: which engine to start.
        spec: what the engine is told, as JSON. For an engine on several GPUs, `on_gpus` gives the options to add.
        gpus: how many it runs on. Each process then reads every request, as vLLM demands of external launchers.
    """

    def __init__(self, module: str, kind: str, spec: dict[str, Any], gpus: int = 1) -> None:
        self.kind = kind
        self._module = module
        port = str(free_port())
        self._ranks = [_Rank(module, kind, _rank_environ(rank, gpus, port)) for rank in range(gpus)]
        self.ask(spec)

    def ask(self, request: Any) -> Any:
        """The engine's answer; if it has several processes, that of the first.

        Raises:
            SystemExit: a process has ended.
        """
        message = json.dumps(request).encode()
        for rank in self._ranks:
            rank.send(message)
        waiting, replies = {rank.connection: rank for rank in self._ranks}, {}
        while waiting:
            for connection in wait(list(waiting)):
                rank = waiting.pop(connection)
                replies[rank] = rank.receive()
                if replies[rank] is None:
                    self._end(rank)
        return json.loads(replies[self._ranks[0]])

    def _end(self, ended: "_Rank") -> NoReturn:
        """Stop because one process has ended: end the others, which wait for it."""
        status = ended.process.wait()
        for rank in self._ranks:
            rank.process.kill()
        sys.exit(f"The {self.kind} engine of {self._module} ended with status {status}; its output above says why.")

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self._ranks:
            rank.connection.close()
        for rank in self._ranks:
            rank.process.wait()


class _Rank:
    """A process and the connection to it."""

    def __init__(self, module: str, kind: str, environ: dict[str, str]) -> None:
        self.connection, theirs = Pipe()
        command = [sys.executable, "-m", module, "--serve", kind, "--connection", str(theirs.fileno())]
        environ = {**os.environ, **ENVIRON, **environ}
        self.process = subprocess.Popen(command, env=environ, pass_fds=[theirs.fileno()])
        theirs.close()

    def send(self, message: bytes) -> None:
        with suppress(ConnectionError):  # `receive` reports it
            self.connection.send_bytes(message)

    def receive(self) -> bytes | None:
        """A reply, or None if the process has ended."""
        try:
            return self.connection.recv_bytes()
        except (EOFError, ConnectionError):
            return None


def _rank_environ(rank: int, gpus: int, port: str) -> dict[str, str]:
    """The environment that tells one of several processes which it is, as torchrun sets it."""
    if gpus == 1:
        return {}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": gpus, "LOCAL_WORLD_SIZE": gpus}
    return {name: str(of) for name, of in numbers.items()} | {"MASTER_ADDR": HOST, "MASTER_PORT": port}


def on_gpus(gpus: int) -> dict[str, Any]:
    """Options of an engine that runs on so many GPUs, tensor-parallel, started by EngineProcess."""
    if gpus == 1:
        return {}
    return {"tensor_parallel_size": gpus, "distributed_executor_backend": "external_launcher"}


def is_first_rank() -> bool:
    """Whether this process gives the engine's answer. What must be done once is done here only."""
    return os.environ.get("RANK", "0") == "0"


def serve_requests(start: Start) -> bool:
    """In the process of an EngineProcess, answer requests until there are no more, and return True.

    Args:
        start: makes an engine of a kind from a spec, and returns the function that answers requests.
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
    """What the worker of each kind finds, by kind. Workers run one after the other, because each needs the whole GPU.

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
    """In a process that `measure` started, run the worker, pass on what it found, and return True."""

    def start(kind: str, spec: dict[str, Any]) -> Callable[[Any], Any]:
        found = worker(kind, spec)
        return lambda _: found

    return serve_requests(start)
