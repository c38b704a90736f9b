# SPDX-License-Identifier: Apache-2.0
"""All clients at once, against one server, for a while."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import aiohttp

from benchmarks import SPARSE
from benchmarks.soak.client import Target, send
from benchmarks.soak.found import Found
from benchmarks.soak.schedule import Fate, Mix, Request, requests
from benchmarks.soak.watch import RUNNING, WAITING, Watch, read_totals, scrape
from minference_vllm.evals.work import Work, parse

IDLE_TIMEOUT_S = 30.0
IDLE_POLL_S = 0.5
COUNTED_S = 3.0  # after which all is counted, as workers publish once a second


@dataclass(frozen=True, slots=True)
class Traffic:
    """What is sent to each server.

    Attributes:
        mix: what requests are drawn from.
        clients: how many at once.
        seconds: how long requests are sent; answers that are under way then are awaited.
        seed: the same seed gives the same requests at the same times.
    """

    mix: Mix
    clients: int
    seconds: float
    seed: int


async def drive(traffic: Traffic, target: Target, backend: str, watch: Watch, is_alive: Callable[[], bool]) -> Found:
    """Send all requests, and return the findings.

    Args:
        is_alive: whether the server's process runs; if it does not, nothing more is sent.
    """
    found = Found(backend)
    # No connection is used twice, because one that the server closes as idle at that moment would look like an error.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout()) as session:
        at_start = await asyncio.to_thread(_work, target)
        await _warm_up(session, traffic, target)
        before = await asyncio.to_thread(_settled_work, target)
        if backend == SPARSE and not (before - at_start).sparse_tokens:
            raise SystemExit(f"{target.url} ran nothing of a long prompt sparse: its log says why.")
        watching = asyncio.create_task(watch.run())
        began = time.monotonic()
        try:
            clients = (
                _client(session, traffic, target, number, began, found, is_alive) for number in range(traffic.clients)
            )
            await asyncio.gather(*clients)
        finally:
            seconds = time.monotonic() - began
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching  # raises the exception if watching ended early
    found.counts["restarts"] += watch.restarts + (not is_alive())
    if watch.unread and is_alive():
        found.counts["errors"] += watch.unread
        found.errors["/metrics could not be read"] += watch.unread
    if is_alive():
        found.counts["left_requests"] += await asyncio.to_thread(left_requests, target.url)
        _count_work(found, await asyncio.to_thread(_settled_work, target), before)
    found.counts["preemptions"] += watch.preemptions
    return replace(found, seconds=seconds, growth=watch.growth())


async def _client(
    session: aiohttp.ClientSession, traffic: Traffic, target: Target, number: int, began: float, found: Found,
    is_alive: Callable[[], bool],
) -> None:  # fmt: skip
    for request in requests(traffic.mix, traffic.seed, number, traffic.clients):
        elapsed = time.monotonic() - began
        if max(elapsed, request.at_s) >= traffic.seconds or not is_alive():
            return
        await asyncio.sleep(max(request.at_s - elapsed, 0.0))
        found.take(await send(session, target, request), request.is_long, max(elapsed - request.at_s, 0.0))


async def _warm_up(session: aiohttp.ClientSession, traffic: Traffic, target: Target) -> None:
    """Ask for a long and a short answer, which compiles what is compiled on first use. They are not counted."""
    for is_long in (True, False):
        tokens = (traffic.mix.long_tokens if is_long else traffic.mix.short_tokens)[1]
        request = Request(0.0, is_long, tokens, traffic.mix.answer_tokens[1], 0.0, Fate.ANSWERED, 0.0)
        sent = await send(session, target, request)
        if sent.error:
            raise SystemExit(f"{target.url} does not answer: {sent.error}")


def left_requests(url: str) -> int:
    """Requests that the server still holds; it has some time to notice that clients have hung up."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    while True:
        totals = read_totals(scrape(url))
        held = int(totals.get(RUNNING, 0.0) + totals.get(WAITING, 0.0))
        if not held or time.monotonic() > deadline:
            return held
        time.sleep(IDLE_POLL_S)


def _work(target: Target) -> Work:
    return parse(scrape(target.url))


def _settled_work(target: Target) -> Work:
    time.sleep(COUNTED_S)
    return _work(target)


def _count_work(found: Found, after: Work, before: Work) -> None:
    if after.broken_ranks:
        found.counts["errors"] += after.broken_ranks
        found.errors["sparse attention failed, and all ran dense from then on"] += after.broken_ranks
    done = after - before
    for name in ("sparse_tokens", "kept_pairs", "causal_pairs"):
        found.counts[name] += getattr(done, name)
