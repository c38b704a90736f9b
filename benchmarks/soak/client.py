# SPDX-License-Identifier: Apache-2.0
"""Sends one request and reads its stream, or hangs up on it, as the request's fate demands."""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from benchmarks.soak.schedule import Fate, Request

ANSWER_TIMEOUT_S = 300.0
LONGEST_PATIENCE_S = 0.5
"""A client that hangs up before the first token does so within this time."""

DATA, DONE = b"data: ", b"[DONE]"
SHOWN = 200  # characters of an error
REFUSED = range(400, 500)


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go.

    Attributes:
        url: the server's.
        model: as the API names it.
        most_tokens: the most tokens that a request may have.
        source: tokens that prompts are cut from, more than one prompt has.
    """

    url: str
    model: str
    most_tokens: int
    source: Sequence[int]

    def body(self, request: Request) -> dict[str, Any]:
        start = int(request.place * (len(self.source) - request.prompt_tokens))
        return {
            "model": self.model,
            "prompt": list(self.source[start : start + request.prompt_tokens]),
            "max_tokens": request.answer_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def invalid_body(self, request: Request) -> bytes:
        """A body that a server must refuse, wrong in one of four ways."""
        body = self.body(request)
        wrong = (
            json.dumps({**body, "max_tokens": -1}),
            json.dumps({**body, "prompt": [self.source[0]] * (self.most_tokens + 1)}),
            json.dumps({**body, "model": f"no-{self.model}"}),
            json.dumps(body)[:-1],
        )
        return wrong[int(request.moment * len(wrong))].encode()


@dataclass(slots=True)
class Sent:
    """The result of a request.

    Attributes:
        fate: how it ended, which is not always what was drawn: a token may come before its client hangs up.
        error: what went wrong without being provoked.
        ttft_s: seconds until the first token.
        gaps_s: seconds between each token and the next.
    """

    fate: Fate
    error: str = ""
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)


async def send(session: aiohttp.ClientSession, target: Target, request: Request) -> Sent:
    """Send a request and return its result. Whatever the server does, no exception is raised."""
    patience = request.moment * LONGEST_PATIENCE_S if request.fate is Fate.DROPPED else ANSWER_TIMEOUT_S
    sent = Sent(request.fate)
    try:
        async with asyncio.timeout(patience):
            if request.fate is Fate.INVALID:
                sent.error = await _be_refused(session, target, request)
            else:
                await _read(session, target, request, sent)
    except TimeoutError:
        if request.fate is not Fate.DROPPED:
            sent.error = f"no answer in {ANSWER_TIMEOUT_S:.0f} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: the reply is no JSON
        sent.error = f"{type(error).__name__}: {error}"[:SHOWN]
    return sent


async def _be_refused(session: aiohttp.ClientSession, target: Target, request: Request) -> str:
    """What is wrong with the answer to an invalid request; empty if it was refused."""
    headers = {"Content-Type": "application/json"}
    async with session.post(_path(target), data=target.invalid_body(request), headers=headers) as response:
        return "" if response.status in REFUSED else f"an invalid request got HTTP {response.status}"


async def _read(session: aiohttp.ClientSession, target: Target, request: Request, sent: Sent) -> None:
    hang_up_after = _tokens_to_read(request)
    began = last = time.perf_counter()
    written, is_done = 0, False
    async with session.post(_path(target), json=target.body(request)) as response:
        if response.status != 200:
            sent.error = f"HTTP {response.status}: {await response.text()}"[:SHOWN]
            return
        async for line in response.content:
            if not line.startswith(DATA):
                continue
            now = time.perf_counter()
            if line.startswith(DONE, len(DATA)):
                is_done = True
                break
            event = json.loads(line[len(DATA) :])
            if "error" in event:
                sent.error = f"in the stream: {event['error']}"[:SHOWN]
                return
            if not event["choices"]:
                written = event["usage"]["completion_tokens"]
                continue
            if sent.ttft_s is None:
                sent.ttft_s = now - began
            else:
                sent.gaps_s.append(now - last)
            last = now
            if len(sent.gaps_s) + 1 >= hang_up_after:
                sent.fate = Fate.CANCELLED
                response.close()  # not read to its end, so that the server notices
                return
    sent.fate = Fate.ANSWERED  # even if its client was to hang up: the last event may hold two tokens
    if not is_done or written != request.answer_tokens:
        sent.error = f"{written} tokens of {request.answer_tokens}, {'with' if is_done else 'without'} an end"


def _tokens_to_read(request: Request) -> float:
    """The number of tokens after which the client hangs up."""
    if request.fate is Fate.DROPPED:
        return 1
    if request.fate is Fate.CANCELLED:
        return 1 + int(request.moment * (request.answer_tokens - 1))
    return float("inf")


def _path(target: Target) -> str:
    return f"{target.url}/v1/completions"
