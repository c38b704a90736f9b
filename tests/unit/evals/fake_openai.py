# SPDX-License-Identifier: Apache-2.0
"""A server that speaks as vLLM does, in a thread: it knows no language, and says what a test wants it to."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Lock, Thread
from typing import Any

import prometheus_client
from prometheus_client import CollectorRegistry

from minference_vllm.metrics.exporter import DirectoryCollector
from minference_vllm.metrics.snapshot import Snapshot
from minference_vllm.recall import NUM_BUCKETS, LayerRecall, Recall

MODEL, VERSION = "a-model", "0.33.0"
DENSITY, RECALL = 0.25, 0.9
PAIRS = 1000  # causal pairs that every prompt counts


class Refusal(Exception):
    """What a test's answer raises to have the server answer with a status that is no success."""


class FakeServer(ThreadingHTTPServer):
    """Counts what it is asked, as the plugin's exporter shows it.

    Args:
        path: of attention on which all prompts run; None for a server without the plugin's metrics.
        answer: the text after a prompt, from the request.
    """

    daemon_threads = True

    def __init__(self, path: str | None, answer: Callable[[dict[str, Any]], str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.path, self.answer = path, answer
        self.asked: list[dict[str, Any]] = []
        self.logprob = -1.0
        self.prompts_until_broken: float = math.inf
        self.step_tokens, self.step_logprob = (1, 2, 3, 4), -0.5
        self._lock, self._snapshot = Lock(), Snapshot()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, request: dict[str, Any]) -> None:
        with self._lock:
            self.asked.append(request)
            if self.path is not None:
                self._snapshot += one_prompt(self.path, len(request["prompt"]))

    def metrics(self) -> str:
        if self.path is None:
            return "# HELP vllm:other Nothing of ours.\n"
        with self._lock:
            is_broken = len(self.asked) >= self.prompts_until_broken
            return exposed(self._snapshot + Snapshot(broken_ranks=int(is_broken)))

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        prompt = request["prompt"]
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "text": self.answer(request), "logprobs": None}
        if "prompt_logprobs" in request:
            entry = {"logprob": self.logprob, "rank": 1 if self.logprob > -1.5 else 2, "decoded_token": "x"}
            choice["prompt_logprobs"] = [None, *({str(token): entry} for token in prompt[1:])]
        if request.get("logprobs"):
            tokens = [f"token_id:{token}" for token in self.step_tokens]
            top = [{token: self.step_logprob, "token_id:99": -1.5} for token in tokens]
            choice["logprobs"] = {
                "tokens": tokens,
                "top_logprobs": top,
                "token_logprobs": [self.step_logprob] * len(tokens),
                "text_offset": [0] * len(tokens),
            }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": 1, "total_tokens": len(prompt) + 1}
        return {
            "id": "1", "object": "text_completion", "created": 0, "model": MODEL, "choices": [choice], "usage": usage,
        }  # fmt: skip


def exposed(total: Snapshot) -> str:
    """The page of /metrics that the plugin's exporter makes of these counts."""
    with TemporaryDirectory() as folder:
        Path(folder, "1-0.json").write_text(total.to_json())
        registry = CollectorRegistry()
        registry.register(DirectoryCollector(folder))
        return prometheus_client.generate_latest(registry).decode()


def one_prompt(path: str, tokens: int) -> Snapshot:
    """What the plugin counts of a prompt, in one layer of two heads."""
    labels = (path, "gate_open" if path == "sparse" else "below_min_seq_len")
    if path != "sparse":
        return Snapshot(Counter({labels: tokens}), Counter({labels: 1}))
    buckets = [0] * NUM_BUCKETS
    buckets[6] = 2  # from .85 to .9
    recall = Recall(tuple(buckets), 1, {0: LayerRecall(1, (RECALL, RECALL), (RECALL, RECALL))})
    return Snapshot(Counter({labels: tokens}), Counter({labels: 1}), int(PAIRS * DENSITY), PAIRS, recall)


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        pages = {
            "/health": "",
            "/metrics": self.server.metrics(),
            "/version": json.dumps({"version": VERSION}),
            "/v1/models": json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}),
        }
        self._send(200 if self.path in pages else 404, pages.get(self.path, ""))

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        try:
            answer = self.server.complete(request)
        except Refusal as refusal:
            self._send(400, json.dumps({"error": {"message": str(refusal)}}))
            return
        self.server.count(request)
        self._send(200, json.dumps(answer))

    def _send(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if self.path == "/metrics" else "application/json")
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@contextmanager
def fake_server(path: str | None, answer: Callable[[dict[str, Any]], str]) -> Iterator[FakeServer]:
    """A server inside a `with` block."""
    server = FakeServer(path, answer)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
