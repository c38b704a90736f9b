# SPDX-License-Identifier: Apache-2.0
"""How benchmarks.soak speaks with a server. A small one in this process stands for vLLM's."""

import asyncio
import itertools
import json
import math
import re
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from benchmarks import results
from benchmarks.soak import __main__ as soak
from benchmarks.soak import traffic, watch
from benchmarks.soak.client import Sent, Target, send
from benchmarks.soak.schedule import Fate, Mix, Request
from benchmarks.soak.traffic import Traffic, drive

RUN = {name: name for name in ("gpu", "driver", "vllm", "torch", "triton", "commit", "command", "date")}
MODEL, MOST_TOKENS = "m", 50
MIX = Mix(
    rate=200.0, short_tokens=(2, 4), long_tokens=(10, 20), answer_tokens=(3, 6), cancelled=0.1, dropped=0.1, invalid=0.1
)


class FakeServer:
    """Streams as vLLM does. What it does wrong, a test sets.

    Attributes:
        status: of valid requests.
        lost: tokens at the end of an answer that are not sent.
        cuts, fails: whether a stream ends in its middle without a word, or with an error.
        refuses: whether it refuses what is invalid.
        pause_s: before each token.
        leaks: whether it goes on counting requests whose client has hung up.
        answers_until_broken: after so many its metrics say that sparse attention has failed for good.
        answers_until_dense: after so many nothing runs sparse any more.
    """

    def __init__(self) -> None:
        self.status, self.lost, self.cuts, self.fails, self.refuses, self.leaks = 200, 0, False, False, True, False
        self.pause_s = 0.0
        self.answers_until_broken = self.answers_until_dense = math.inf
        self.running = self.hung_up = self.answered = 0

    async def complete(self, http: web.Request) -> web.StreamResponse:
        try:
            asked = await http.json()
        except json.JSONDecodeError:
            asked = {"model": "", "max_tokens": 0, "prompt": []}
        is_valid = asked["model"] == MODEL and asked["max_tokens"] > 0 and len(asked["prompt"]) <= MOST_TOKENS
        if not is_valid:
            return web.Response(status=400 if self.refuses else 200)
        if self.status != 200:
            return web.Response(status=self.status, text="engine is dead")
        response = web.StreamResponse()
        await response.prepare(http)
        self.running += 1
        try:
            await self._stream(response, asked["max_tokens"])
        except ConnectionError:
            self.hung_up += 1
            self.running += self.leaks
        finally:
            self.running -= 1
        return response

    async def _stream(self, response: web.StreamResponse, tokens: int) -> None:
        async def event(body: dict[str, Any]) -> None:
            await response.write(f"data: {json.dumps(body)}\n\n".encode())

        for number in range(tokens - self.lost):
            await asyncio.sleep(self.pause_s)
            await event({"choices": [{"text": "x"}]})
            if self.cuts and number == 1:
                return
            if self.fails and number == 1:
                await event({"error": {"message": "EngineCore"}})
        await event({"choices": [], "usage": {"completion_tokens": tokens - self.lost}})
        await response.write(b"data: [DONE]\n\n")
        self.answered += 1

    async def metrics(self, _: web.Request) -> web.Response:
        sparse = min(self.answered, self.answers_until_dense)
        tokens = f'minference_prefill_tokens_total{{path="sparse",reason="gate_open"}} {sparse}'
        pairs = f"minference_kept_pairs_total {self.answered}\nminference_causal_pairs_total {4 * self.answered}"
        broken = f"minference_broken_ranks {int(self.answered >= self.answers_until_broken)}"
        return web.Response(text=f"{watch.STARTED} 1\n{watch.RUNNING} {self.running}\n{tokens}\n{pairs}\n{broken}\n")

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": MODEL, "max_model_len": MOST_TOKENS}]})


def with_server(server: FakeServer, use: Callable[[Target], Awaitable[Any]]) -> Any:
    """What `use` gives, of the fake server."""

    async def run() -> Any:
        app = web.Application()
        app.add_routes([web.post("/v1/completions", server.complete), web.get("/metrics", server.metrics)])
        app.add_routes([web.get("/v1/models", server.models)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            return await use(Target(f"http://127.0.0.1:{port}", MODEL, MOST_TOKENS, range(100)))
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def sent_to(server: FakeServer, fate: Fate, moment: float = 0.5, answer_tokens: int = 6) -> Sent:
    async def use(target: Target) -> Sent:
        async with aiohttp.ClientSession() as session:
            return await send(session, target, Request(0.0, False, 5, answer_tokens, 0.5, fate, moment))

    return with_server(server, use)


def test_an_answer_is_timed_token_by_token() -> None:
    server = FakeServer()
    server.pause_s = 0.02
    sent = sent_to(server, Fate.ANSWERED)
    assert (sent.error, sent.fate, len(sent.gaps_s)) == ("", Fate.ANSWERED, 5)
    assert sent.ttft_s is not None and min(sent.ttft_s, *sent.gaps_s) > 0.01


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 500}, "HTTP 500: engine is dead"),
        ({"lost": 1}, "5 tokens of 6, with an end"),
        ({"cuts": True}, "0 tokens of 6, without an end"),
        ({"fails": True}, "in the stream: .*EngineCore"),
    ],
)
def test_what_is_no_whole_answer_is_an_error(fault: dict[str, Any], said: str) -> None:
    server = FakeServer()
    vars(server).update(fault)
    assert re.match(said, sent_to(server, Fate.ANSWERED).error)


def test_a_server_that_is_not_there_is_an_error() -> None:
    async def use() -> Sent:
        async with aiohttp.ClientSession() as session:
            target = Target("http://127.0.0.1:9", MODEL, MOST_TOKENS, range(100))
            return await send(session, target, Request(0.0, False, 5, 6, 0.5, Fate.ANSWERED, 0.5))

    assert asyncio.run(use()).error.startswith("ClientConnectorError")


def test_a_client_hangs_up_in_the_middle() -> None:
    server = FakeServer()
    server.pause_s = 0.02
    sent = sent_to(server, Fate.CANCELLED, moment=0.5, answer_tokens=40)
    assert (sent.error, sent.fate, len(sent.gaps_s)) == ("", Fate.CANCELLED, 19)
    assert not server.answered


def test_a_client_hangs_up_before_the_first_token() -> None:
    server = FakeServer()
    server.pause_s = 1.0
    sent = sent_to(server, Fate.DROPPED, moment=0.1)
    assert (sent.error, sent.fate, sent.ttft_s) == ("", Fate.DROPPED, None)


def test_a_token_that_comes_before_its_client_hangs_up_is_cancelled() -> None:
    sent = sent_to(FakeServer(), Fate.DROPPED, moment=0.99)
    assert (sent.error, sent.fate, sent.gaps_s) == ("", Fate.CANCELLED, [])


@pytest.mark.parametrize("moment", [0.1, 0.3, 0.6, 0.9])
def test_an_invalid_request_must_be_refused(moment: float) -> None:
    server = FakeServer()
    assert sent_to(server, Fate.INVALID, moment).error == ""
    server.refuses = False
    assert sent_to(server, Fate.INVALID, moment).error == "an invalid request got HTTP 200"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("IDLE_TIMEOUT_S", 0.2), ("IDLE_POLL_S", 0.02), ("COUNTED_S", 0.0)):
        monkeypatch.setattr(traffic, name, seconds)
    monkeypatch.setattr(watch, "EVERY_S", 0.02)


def drive_fake(server: FakeServer, is_alive: Callable[[], bool] = lambda: True) -> Any:
    async def use(target: Target) -> Any:
        watching = watch.Watch(target.url, None, has_gpu=False)
        return await drive(Traffic(MIX, clients=8, seconds=1.0, seed=0), target, "sparse", watching, is_alive)

    return with_server(server, use)


def test_a_server_that_gives_sparse_attention_up_in_the_middle_is_told(quick: None) -> None:
    server = FakeServer()
    server.answers_until_broken = 5
    found = drive_fake(server)
    assert (
        found.errors == {"sparse attention failed, and all ran dense from then on": 1} and found.counts["errors"] == 1
    )


def test_what_ran_sparse_before_the_traffic_does_not_count(quick: None) -> None:
    server = FakeServer()
    server.answered = server.answers_until_dense = 5
    with pytest.raises(SystemExit, match="ran nothing of a long prompt sparse"):
        drive_fake(server)


def test_traffic_of_all_kinds_leaves_a_good_server_without_errors(quick: None) -> None:
    found = drive_fake(FakeServer())
    assert found.errors == {} and found.counts["left_requests"] == found.counts["restarts"] == 0
    assert min(found.counts[name] for name in ("answered_short", "answered_long", "cancelled", "refused")) > 0
    assert found.density == 0.25 and found.counts["sparse_tokens"] >= found.counts["answered_short"]
    assert found.times["itl_short"].total > found.times["ttft_short"].total > 20


def test_requests_that_a_server_still_holds_are_counted(quick: None) -> None:
    server = FakeServer()
    server.leaks, server.pause_s = True, 0.005
    found = drive_fake(server)
    assert found.counts["left_requests"] == server.hung_up > 0


def test_nothing_more_is_sent_to_a_server_that_has_ended(quick: None) -> None:
    calls = itertools.count()
    found = drive_fake(FakeServer(), lambda: next(calls) < 30)
    assert found.counts["restarts"] == 1
    assert sum(found.counts[name] for name in ("answered_short", "answered_long", "errors")) <= 30


def test_what_ends_the_watch_ends_the_run(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "scrape", lambda url: "no metrics\n{")
    monkeypatch.setattr(watch, "read_totals", lambda page: {}["a watched name"])
    with pytest.raises(KeyError, match="a watched name"):
        drive_fake(FakeServer())


def run_program(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["soak", "--tiny", *arguments])
    monkeypatch.setattr(results, "describe_run", lambda *_: RUN)
    return soak.main()


def test_stretches_against_servers_that_run_become_one_result(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 100}')
    sizes = ["--short-tokens", "2", "4", "--long-tokens", "10", "20", "--answer-tokens", "3", "6"]
    asked = ["--minutes", "0.03", "--clients", "4", "--rate", "100", *sizes]
    files = [str(tmp_path / f"{seed}.json") for seed in (1, 2)]

    async def use(target: Target) -> None:
        urls = ["--dense-url", target.url, "--sparse-url", target.url]
        for seed, file in enumerate(files, 1):
            given = ["--model", str(tmp_path), *urls, *asked, "--seed", str(seed), "--out", file]
            status = await asyncio.to_thread(run_program, monkeypatch, *given)
            assert status == bool(json.loads(Path(file).read_text())["exceeded"])

    with_server(FakeServer(), use)
    status = run_program(monkeypatch, "--merge", *files, "--out", str(tmp_path / "all.json"))
    merged = json.loads((tmp_path / "all.json").read_text())
    assert status == bool(merged["exceeded"]) and merged["watched"] == []
    total, *stretches = (
        [row["answered_short"] for row in merged["rows"] if (row["stretch"], row["backend"]) == (stretch, "sparse")]
        for stretch in ("all", 1, 2)
    )
    assert sum(total) == sum(map(sum, stretches)) > 0


def test_traffic_that_does_not_fit_the_server_is_refused(tmp_path: Path) -> None:
    async def use(target: Target) -> None:
        await asyncio.to_thread(soak.make_target, target.url, range(9), Traffic(too_long, 1, 1.0, 0))

    too_long = replace(MIX, long_tokens=(10, MOST_TOKENS))
    with pytest.raises(SystemExit, match="requests have up to 56 tokens"):
        with_server(FakeServer(), use)
