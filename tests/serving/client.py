# SPDX-License-Identifier: Apache-2.0
"""Greedy completions through the official client, and what the server counted meanwhile."""

import json
import time
import urllib.request
from typing import Any, NamedTuple

from demo.server import Server, open_directly
from tests.serving.server import MODEL

Prompt = str | list[int]


class Reply(NamedTuple):
    text: str
    prompt_tokens: int
    first_logprob: float


class Prefilled(NamedTuple):
    """Prompt tokens that a server has counted: all, and those that ran sparse."""

    tokens: float
    sparse: float


def _completion(server: Server, prompt: Prompt, salt: str, max_tokens: int, **options: Any) -> Any:
    extra = {"cache_salt": salt, "ignore_eos": True}
    return server.client().completions.create(
        model=str(MODEL), prompt=prompt, max_tokens=max_tokens, temperature=0, extra_body=extra, **options
    )


def complete(server: Server, prompt: Prompt, salt: str, max_tokens: int) -> Reply:
    reply = _completion(server, prompt, salt, max_tokens, logprobs=1)
    choice = reply.choices[0]
    return Reply(choice.text, reply.usage.prompt_tokens, choice.logprobs.token_logprobs[0])


def stream(server: Server, prompt: Prompt, salt: str, max_tokens: int) -> list[str]:
    """The pieces in which the text arrives."""
    return [event.choices[0].text for event in _completion(server, prompt, salt, max_tokens, stream=True)]


def tokenize(server: Server, text: str) -> list[int]:
    body = json.dumps({"model": str(MODEL), "prompt": text}).encode()
    request = urllib.request.Request(f"{server.url}/tokenize", body, {"Content-Type": "application/json"})
    with open_directly(request, timeout=60) as response:
        return json.load(response)["tokens"]


def prefilled_so_far(server: Server) -> Prefilled:
    name = "minference_prefill_tokens_total"
    return Prefilled(server.metric(name), server.metric(name, path="sparse"))


def prefilled(server: Server) -> Prefilled:
    """What is counted once it has not changed for longer than workers take to publish."""
    found, since = prefilled_so_far(server), time.monotonic()
    while time.monotonic() - since < 2.5:
        time.sleep(0.25)
        if (now := prefilled_so_far(server)) != found:
            found, since = now, time.monotonic()
    return found
