# SPDX-License-Identifier: Apache-2.0
"""The installed vLLM's own client sends what we ask it to, and its file holds what we read."""

import asyncio
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from minference_vllm.bench import sender
from minference_vllm.bench.load import Load, Point
from minference_vllm.bench.request import Request
from tests.conftest import import_or_skip

MODEL, WRITTEN, REQUESTS = "a-model", 4, 3
BY_CONCURRENCY = Point(input_len=32, output_len=WRITTEN, rate=None, concurrency=2)
BY_RATE = Point(input_len=32, output_len=WRITTEN, rate=100.0, concurrency=None)


class StreamingServer(ThreadingHTTPServer):
    """Streams completions as vLLM does, but those that are to fail."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.fails = False


class Handler(BaseHTTPRequestHandler):
    server: StreamingServer

    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            self.send_error(404)
            return
        self.server.asked.append(request)
        if self.server.fails:
            self.send_error(400, "too long")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        usage = {"prompt_tokens": len(request["prompt"].split()), "completion_tokens": request["max_tokens"]}
        pieces = [{"choices": [{"text": "x"}]}] * request["max_tokens"] + [{"choices": [], "usage": usage}]
        for piece in [*map(json.dumps, pieces), "[DONE]"]:
            self.wfile.write(f"data: {piece}\n\n".encode())

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


@pytest.fixture
def server() -> Iterator[StreamingServer]:
    with StreamingServer() as started:
        Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield started
        started.shutdown()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Each word is a token, so that random tokens are the same once they have been written out."""
    tokenizers, transformers = import_or_skip("tokenizers"), import_or_skip("transformers")
    words = {f"w{number}": number for number in range(500)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return str(folder)


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's client without a process of its own, whose imports would take ten seconds."""
    import_or_skip("vllm")
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(allow_abbrev=False)
    add_cli_args(parser)
    monkeypatch.setattr(sender, "_run", lambda arguments, *_: asyncio.run(main_async(parser.parse_args(arguments))))


@pytest.fixture
def send(server: StreamingServer, tokenizer: str, tmp_path: Path) -> Callable[..., tuple[float, tuple[Request, ...]]]:
    client = SimpleNamespace(url=f"http://127.0.0.1:{server.server_port}", model=MODEL)

    def sent(point: Point, *options: str, text: Path | None = None) -> tuple[float, tuple[Request, ...]]:
        load = Load(REQUESTS, 1, 7, tokenizer, options, text, tmp_path)
        load.cut_prompts([point])
        return sender.send(client, load, point, REQUESTS, tmp_path / "log", 60)

    return sent


@pytest.mark.parametrize("point", [BY_CONCURRENCY, BY_RATE], ids=["in flight", "at a rate"])
def test_what_is_asked_for_is_sent_and_read(point: Point, server: StreamingServer, send: Callable[..., Any]) -> None:
    duration, requests = send(point)
    assert len(requests) == len(server.asked) == REQUESTS
    for request in requests:
        assert (request.input_tokens, request.output_tokens, request.error) == (point.input_len, WRITTEN, "")
        assert len(request.gaps) == WRITTEN - 1
        assert 0 < request.ttft <= request.latency < duration
        assert request.latency == pytest.approx(request.ttft + sum(request.gaps))


def test_two_runs_send_the_same_with_another_salt(server: StreamingServer, send: Callable[..., Any]) -> None:
    for _ in range(2):
        send(BY_CONCURRENCY)
    first, second = server.asked[:REQUESTS], server.asked[REQUESTS:]
    assert {each["prompt"] for each in first} == {each["prompt"] for each in second}
    assert len({each["prompt"] for each in first}) == REQUESTS
    assert [len({each["cache_salt"] for each in run}) for run in (first, second, server.asked)] == [1, 1, 2]
    assert {(each["temperature"], each["max_tokens"], each["ignore_eos"]) for each in server.asked} == {
        (0, WRITTEN, True)
    }


def test_an_option_may_say_otherwise(server: StreamingServer, send: Callable[..., Any]) -> None:
    send(BY_CONCURRENCY, "--temperature=0.5", "--top-p", "0.9")
    assert {(each["temperature"], each["top_p"]) for each in server.asked} == {(0.5, 0.9)}


def test_prompts_that_were_cut_from_a_text_are_sent_as_they_are(
    server: StreamingServer, send: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("pandas", reason="vLLM reads prompts with it")
    text = " ".join(f"w{number * number % 500}" for number in range(2000))
    (tmp_path / "novel.txt").write_text(text)
    _, requests = send(BY_CONCURRENCY, text=tmp_path / "novel.txt")
    assert {request.input_tokens for request in requests} == {BY_CONCURRENCY.input_len}
    assert len({each["prompt"] for each in server.asked}) == REQUESTS
    assert all(each["prompt"] in text and each["ignore_eos"] for each in server.asked)
    assert {each["max_tokens"] for each in server.asked} == {WRITTEN}


def test_a_request_that_fails_has_its_reason(server: StreamingServer, send: Callable[..., Any]) -> None:
    server.fails = True
    _, requests = send(BY_CONCURRENCY)
    assert [request.error for request in requests] == ["too long"] * REQUESTS


def test_a_server_that_is_gone_is_named(server: StreamingServer, send: Callable[..., Any]) -> None:
    server.server_close()
    server.shutdown()
    _, requests = send(BY_CONCURRENCY)
    assert all("Cannot connect" in request.error or "Connect" in request.error for request in requests)
