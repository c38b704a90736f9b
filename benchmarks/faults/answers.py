# SPDX-License-Identifier: Apache-2.0
"""What a server is asked before, during and after a fault: texts that begin again, whose next words are sure."""

import json
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from typing import Any

TEXT_CHARACTERS, CUE_CHARACTERS = 4500, 700
SHORT_CHARACTERS, SHORT_CUE_CHARACTERS = 1200, 300
STARTS = (0, 9000)
ANSWER_TOKENS = 16
TIMEOUT_S = 300.0
SHOWN = 200  # characters of an error
NO_ANSWER = 0
"""The status where the connection broke before there was one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """HTTP status, and what the server wrote: the completion, or the beginning of its error."""

    status: int
    text: str


def begin_again(text: str, start: int, length: int, cue: int) -> str:
    """A text, and after it its own beginning up to the end of a word: it goes on as it did before.

    Raises:
        ValueError: the text is too short.
    """
    passage = text[text.index(" ", start) + 1 :][:length]
    if len(passage) < length:
        raise ValueError(f"the text has {len(text)} characters; {start + length} and a word are needed")
    return f"{passage}\n\n{passage[: passage.index(' ', cue)]}"


def long_prompts(text: str) -> list[str]:
    """Above the gate."""
    return [begin_again(text, start, TEXT_CHARACTERS, CUE_CHARACTERS) for start in STARTS]


def short_prompt(text: str) -> str:
    """Below the gate."""
    return begin_again(text, STARTS[1], SHORT_CHARACTERS, SHORT_CUE_CHARACTERS)


def ask(url: str, model: str, prompt: str, tokens: int = ANSWER_TOKENS) -> Answer:
    """A greedy completion. Nothing of the prompt is taken from the prefix cache."""
    body: dict[str, Any] = {
        "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "cache_salt": uuid.uuid4().hex,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    # A proxy that the environment names has another localhost.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response:
            return Answer(response.status, json.load(response)["choices"][0]["text"])
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read().decode(errors="replace")[:SHOWN])
    except (OSError, ValueError) as error:  # no connection, or one that broke: URLError is an OSError
        return Answer(NO_ANSWER, repr(error)[:SHOWN])


def ask_all(url: str, model: str, text: str) -> list[Answer]:
    """One after the other, so that what shares a step with a prompt changes nothing."""
    return [ask(url, model, prompt) for prompt in (*long_prompts(text), short_prompt(text))]
