# SPDX-License-Identifier: Apache-2.0
"""Starts one `vllm serve` on this machine, and always stops it with all processes that it has started."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

from minference_vllm.errors import ConfigError
from minference_vllm.evals.errors import ServerError

DENSE_BACKEND, SPARSE_BACKEND = "FLASH_ATTN", "minference"
BACKEND_OPTION = "--attention-backend"
TAKEN = (BACKEND_OPTION, "--host", "--port")
SETTINGS_OPTION = "--additional-config"
VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")  # `vllm`, of this environment and no other
HOST = "127.0.0.1"
START_TIMEOUT_S = 3600  # weights may have to be fetched
STOP_TIMEOUT_S = 30
POLL_S = 0.5
LAST_LINES = 20


def arguments(model: str, options: str, is_dense: bool, more: str = "", option: str = "--serve-sparse") -> list[str]:
    """What follows `vllm` to serve a model; the port is not in it.

    Args:
        options: of `vllm serve`, in the syntax of a shell, for all servers.
        more: options for this server alone.
        option: what holds these.

    Raises:
        ConfigError: they choose what is chosen here, or make the servers differ in more than attention.
    """
    given, own = _split("--serve", options), _split(option, more)
    _refuse_unequal(option, own)
    given += own
    for name in option_names(given):
        if name in TAKEN:
            raise ConfigError(f"--serve may not hold {name}, which this command sets: leave it out.")
    backend = [] if is_dense and _is_cpu_build() else [BACKEND_OPTION, DENSE_BACKEND if is_dense else SPARSE_BACKEND]
    return ["serve", model, *backend, *given]


def _split(option: str, given: str) -> list[str]:
    try:
        return shlex.split(given)
    except ValueError as error:
        raise ConfigError(f"{option} is read as a shell does, and is no such line: {error}.") from None


def _refuse_unequal(option: str, own: Sequence[str]) -> None:
    """Check that options for one server alone are the plugin's: with others it would be another test."""
    arguments = iter(own)
    for argument in arguments:
        name, has_value, _ = argument.partition("=")
        name = name.replace("_", "-")
        if name != SETTINGS_OPTION and not name.startswith(f"{SETTINGS_OPTION}."):
            raise ConfigError(
                f"{option} may hold {SETTINGS_OPTION} alone, and holds {name}: the servers would differ in more "
                "than attention. Put it into --serve, for both."
            )
        if not has_value:
            next(arguments, None)


def option_names(arguments: Iterable[str]) -> list[str]:
    """The names of the options among a command's arguments, with dashes for underscores, as vLLM reads them."""
    return [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server on this machine: its URL, and the first of its processes."""

    url: str
    process: subprocess.Popen[bytes]


@contextmanager
def running(arguments: Sequence[str], log: Path) -> Iterator[str]:
    """The URL of a server that runs inside a `with` block; see `started`."""
    with started(arguments, log) as server:
        yield server.url


@contextmanager
def started(arguments: Sequence[str], log: Path, environ: Mapping[str, str] | None = None) -> Iterator[ServerProcess]:
    """A server that runs inside a `with` block. Its output goes to the file `log`.

    Args:
        arguments: what follows `vllm`.
        environ: the environment of its processes; None for that of this process.

    Raises:
        ServerError: it did not come up.
    """
    port = free_port()
    with log_file(log) as output:
        process = subprocess.Popen(
            [*VLLM, *arguments, "--host", HOST, "--port", str(port)],
            env=environ,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own: `stop` reaches vLLM's workers too
        )
    try:
        url = f"http://{HOST}:{port}"
        _wait_until_ready(process, url, log)
        yield ServerProcess(url, process)
    finally:
        stop(process)


def log_file(path: Path) -> BinaryIO:
    """A file to which the output of a process is appended.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None


def excerpt(log: Path) -> str:
    """The end of a log, after earlier lines that name an error: vLLM prints the cause far above its last words."""
    lines = log.read_text(errors="replace").splitlines()
    causes = [line for line in lines[:-LAST_LINES] if "Error: " in line]
    return "\n".join([*causes[-LAST_LINES:], "...", *lines[-LAST_LINES:]])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    # No proxy: to a proxy that the environment names, localhost is another machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(f"vllm serve ended with status {process.returncode}. {log} ends so:\n{excerpt(log)}")
        with suppress(urllib.error.URLError, ConnectionError, TimeoutError), opener.open(f"{url}/health", timeout=10):
            return
        time.sleep(POLL_S)
    raise ServerError(f"vllm serve was not ready after {START_TIMEOUT_S} s. {log} ends so:\n{excerpt(log)}")


def stop(process: subprocess.Popen[bytes], timeout_s: float = STOP_TIMEOUT_S) -> None:
    """Ask the process group to end, then end whatever is left of it."""
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout_s)
    finally:  # also if the user presses Ctrl-C again while waiting
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def has_vllm() -> bool:
    """Whether vLLM is installed in this environment."""
    return _vllm() is not None


def _is_cpu_build() -> bool:
    if (installed := _vllm()) is None:
        raise ConfigError(
            "--serve starts vLLM, which is not installed beside this command: install it, or give --dense and --sparse."
        )
    return installed.endswith("+cpu")


def _vllm() -> str | None:
    try:
        return version("vllm")
    except PackageNotFoundError:
        return None


def free_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
