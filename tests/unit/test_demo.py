# SPDX-License-Identifier: Apache-2.0
"""How the demo and the serving tests reach a server of this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from demo.run import OPTIONS
from demo.server import free_port
from minference_vllm.config import load_config

ROOT = Path(__file__).parents[2]
ASK = """
import sys
from pathlib import Path
from demo.server import Server

server = Server(sys.argv[1], Path())
sys.stdout.write(f"{server.get('/health')} {server.client().models.list().data}")
"""


class NoModels(BaseHTTPRequestHandler):
    """Answers everything with an empty list of models."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"data": []}')

    def log_message(self, *_: object) -> None:
        """Nothing: the base class writes to stderr."""


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), NoModels) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_local_server_is_reached_past_a_proxy(url: str) -> None:
    # In a process of its own: urllib keeps the proxies that it met first.
    environ = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}
    dead = f"http://127.0.0.1:{free_port()}"
    environ |= {"http_proxy": dead, "HTTP_PROXY": dead, "all_proxy": dead}
    asked = subprocess.run([sys.executable, "-c", ASK, url], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert asked.stdout == '{"data": []} []', asked.stderr


def test_the_settings_of_the_demo_are_taken() -> None:
    [settings] = [json.loads(option) for option in OPTIONS if option.startswith("{")]
    assert load_config(settings, {}).min_seq_len == 2048
