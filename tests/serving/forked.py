# SPDX-License-Identifier: Apache-2.0
"""Servers, and programs with an engine, as processes that fork from one which has imported vLLM: see preloaded.py.

Most of a start on a CPU is imports, so tests of what comes after the start begin here. On a GPU, which no process may
have used before it forks, and for tests of the start itself, processes start as their users start them.
"""

import importlib
import multiprocessing
import os
import subprocess
import sys
from multiprocessing import forkserver
from pathlib import Path
from threading import Lock
from unittest.mock import patch

from demo.server import STOP_TIMEOUT_S, command, environment, start, stop
from tests.serving.server import ON_GPU

ROOT = Path(__file__).parents[2]
_context = multiprocessing.get_context("forkserver")
_starting = Lock()


def start_fork_server() -> None:
    """Call it while no other thread reads the environment, which it changes for a moment."""
    # For what the fork server imports: where it is, and what it reads while it is imported.
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with patch.dict(os.environ, {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}):
        _context.set_forkserver_preload(["tests.serving.preloaded"])
        forkserver.ensure_running()


class Forked:
    """A process of the fork server, with what a subprocess.Popen would offer.

    Args:
        module: the module that holds a function `main`.
        arguments: what `main` finds in sys.argv.
        environ: its environment variables.
        log: receives its output.
    """

    def __init__(self, module: str, arguments: list[str], environ: dict[str, str], log: Path) -> None:
        log.write_bytes(b"")
        self._process = _context.Process(target=_begin, args=(module, arguments, environ, str(log)))
        with _starting:
            self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0.0)
        return self.returncode


def _begin(module: str, arguments: list[str], environ: dict[str, str], log: str) -> None:
    """Runs in the new process."""
    from tests.serving.preloaded import write_to

    os.setpgid(0, 0)  # its own process group: `stop` reaches vLLM's workers too
    write_to(log)
    os.environ.clear()
    os.environ.update(environ)
    sys.path[:0] = filter(None, environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.argv = arguments
    importlib.import_module(module).main()


def start_serving(model: str, log: Path, *options: str, **environ: str) -> "Forked | subprocess.Popen[bytes]":
    """`vllm serve` with our backend, whose output goes to the file `log`."""
    if ON_GPU:
        return start(model, log, *options, **environ)
    arguments, variables = command(model, *options), {**environment(model), **environ}
    return Forked("vllm.entrypoints.cli.main", ["vllm", *arguments[1:]], variables, log)


def run_program(module: str, folder: Path, log: Path, environ: dict[str, str], timeout: float) -> int:
    """The exit status of `python -m module folder`."""
    if ON_GPU:
        arguments = [sys.executable, "-m", module, str(folder)]
        with log.open("wb") as output:
            done = subprocess.run(arguments, cwd=ROOT, env=environ, stdout=output, stderr=output, timeout=timeout)
        return done.returncode
    process = Forked(module, [module, str(folder)], environ, log)
    try:
        return process.wait(timeout)
    finally:
        stop(process, STOP_TIMEOUT_S)
