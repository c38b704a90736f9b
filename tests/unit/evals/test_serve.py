# SPDX-License-Identifier: Apache-2.0
"""Servers that `minference-vllm eval --serve` starts: nothing of them is left, however it ends."""

import argparse
import os
import shlex
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from minference_vllm.cli import evaluate
from minference_vllm.errors import ConfigError
from minference_vllm.evals import serve
from minference_vllm.evals.errors import ServerError

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# It starts a worker that ignores SIGTERM, as a hung engine would, and answers /health.
SERVER = """
import pathlib, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Health(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

worker = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
process = subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE)
process.stdout.readline()
pathlib.Path(sys.argv[1]).write_text(str(process.pid))
HTTPServer(("127.0.0.1", int(sys.argv[-1])), Health).serve_forever()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "STOP_TIMEOUT_S", 1)
    monkeypatch.setattr(serve, "POLL_S", 0.05)
    monkeypatch.setattr(serve, "VLLM", (sys.executable,))


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "server.py").write_text(SERVER)
    return [str(tmp_path / "server.py"), str(tmp_path / "worker")]


def is_running(process: int) -> bool:
    """Whether there is such a process that is not merely waiting for its parent to read its status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(process: int) -> bool:
    deadline = time.monotonic() + 10
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not is_running(process)


def test_a_server_runs_inside_its_block_only(command: list[str], tmp_path: Path) -> None:
    with serve.running(command, tmp_path / "log") as url:
        worker = int((tmp_path / "worker").read_text())
        assert is_running(worker)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert opener.open(f"{url}/health", timeout=5).status == 200
    assert ends(worker)


def test_a_server_has_the_environment_that_it_is_given(command: list[str], tmp_path: Path) -> None:
    environ = {**os.environ, "OF_THIS_SERVER": "1"}
    with serve.started(command, tmp_path / "log", environ) as server:
        assert b"OF_THIS_SERVER=1" in Path(f"/proc/{server.process.pid}/environ").read_bytes().split(b"\0")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_stops_it_too(error: type[BaseException], command: list[str], tmp_path: Path) -> None:
    with pytest.raises(error), serve.running(command, tmp_path / "log"):
        raise error
    assert ends(int((tmp_path / "worker").read_text()))


@pytest.fixture
def handlers() -> Iterator[None]:
    """The command sets signal handlers for its whole process: put those of the tests back.

    It leaves alone what is ignored, as Ctrl-C is in a shell's background job: nothing is, to begin with.
    """
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_command_and_its_server(
    number: signal.Signals, command: list[str], tmp_path: Path, handlers: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def wait(_: argparse.Namespace) -> int:
        with serve.running(command, tmp_path / "log"):
            os.kill(os.getpid(), number)
            time.sleep(60)
        return 0

    monkeypatch.setattr(evaluate, "_evaluate", wait)
    assert evaluate.evaluate(argparse.Namespace()) == evaluate.STOPPED
    assert "the same command goes on" in capsys.readouterr().err
    assert ends(int((tmp_path / "worker").read_text()))


def test_a_server_that_does_not_come_up_shows_its_log(tmp_path: Path) -> None:
    fails = ["-c", "import sys; sys.exit('ValueError: no such model')"]
    said = r"ended with status 1(?s:.*)ValueError: no such model"
    with pytest.raises(ServerError, match=said), serve.running(fails, tmp_path / "log"):
        pass


@pytest.mark.parametrize("taken", ["--attention-backend=X", "--port 1", "--host=a"])
def test_what_is_chosen_here_cannot_be_given(taken: str) -> None:
    with pytest.raises(ConfigError, match=f"--serve may not hold {taken.split('=')[0].split()[0]}"):
        serve.arguments("m", taken, is_dense=True)


@pytest.mark.parametrize("spelt", ["--attention_backend=X", "--attention_backend X"])
def test_nor_can_it_be_in_vllms_other_spelling(spelt: str) -> None:
    with pytest.raises(ConfigError, match="--serve may not hold --attention-backend"):
        serve.arguments("m", spelt, is_dense=False)


@pytest.mark.parametrize(
    "given",
    [
        "--max-num-batched-tokens 2048", "--max_model_len=9", "--dtype bfloat16", "--kv-cache-dtype fp8", "-tp 2",
        "-O3", "--enforce-eager", "--seed=1", "--additional-config '{}' --seed 1", "--additional-config-file x",
    ],
)  # fmt: skip
def test_the_sparse_server_alone_takes_no_option_but_the_plugins_settings(given: str) -> None:
    name = [part.partition("=")[0].replace("_", "-") for part in given.split() if part.startswith("-")][-1]
    said = f"--serve-sparse may hold --additional-config alone, and holds {name}: .* Put it into --serve"
    with pytest.raises(ConfigError, match=said):
        serve.arguments("m", "", is_dense=False, more=given)


@pytest.mark.parametrize("given", ["--additional-config {} extra", "extra"])
def test_words_that_belong_to_no_option_are_refused(given: str) -> None:
    with pytest.raises(ConfigError, match="--serve-sparse may hold --additional-config alone, and holds extra"):
        serve.arguments("m", "", is_dense=False, more=given)


@pytest.mark.parametrize(
    "given",
    ["--additional-config '{\"a\": -1}'", "--additional_config.minference.x=-1", "--additional-config.a -1", ""],
)
def test_the_plugins_settings_go_to_the_sparse_server(given: str) -> None:
    found = serve.arguments("m", "--seed 1", is_dense=False, more=given)
    assert found[4:] == ["--seed", "1", *shlex.split(given)]


def test_a_quotation_mark_does_not_reach_from_one_option_into_the_other() -> None:
    with pytest.raises(ConfigError, match="read as a shell does"):
        serve.arguments("m", "--served-model-name 'a", is_dense=False, more="b' --additional-config x")


def test_the_two_servers_differ_in_their_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    def options(version: str, is_dense: bool) -> list[str]:
        monkeypatch.setattr(serve, "version", lambda name: version)
        return serve.arguments("m", "--max-model-len 9 --override '{\"a\": 1}'", is_dense)

    common = shlex.split("--max-model-len 9 --override '{\"a\": 1}'")
    assert options("0.33.0", True) == ["serve", "m", "--attention-backend", "FLASH_ATTN", *common]
    assert options("0.33.0", False) == ["serve", "m", "--attention-backend", "minference", *common]
    assert options("0.32.0+cpu", True) == ["serve", "m", *common]
    assert options("0.32.0+cpu", False) == ["serve", "m", "--attention-backend", "minference", *common]
