# SPDX-License-Identifier: Apache-2.0
"""What a server is asked before, during and after a fault: texts that repeat themselves, whose next words are sure."""

import json
import math
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from typing import Any

TEXT_CHARACTERS, CUE_CHARACTERS = 4500, 700
SHORT_CHARACTERS, SHORT_CUE_CHARACTERS = 1200, 300
LONG_STARTS, SHORT_START = (9000, 12000), 3000
ANSWER_TOKENS = 16
TIMEOUT_S = 300.0
SHOWN = 200  # characters of an error
OK = 200
NO_ANSWER = 0
"""Stands for an HTTP status if the connection broke before there was one."""


LEAD = math.log(3)
"""Two tokens that are about equally likely may be swapped by the rounding of another kernel. A token therefore counts
as sure only if it is at least three times as likely as the next."""

FEWEST_SURE = 4
"""Sure tokens that an answer must begin with, so that others can be compared with it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered.

    Attributes:
        status: the HTTP status.
        tokens: of the completion.
        leads: by how much each token's log-probability exceeds that of the next likely one; empty if not asked for.
        error: the beginning of a reply that is no completion.
    """

    status: int
    tokens: tuple[int, ...] = ()
    leads: tuple[float, ...] = ()
    error: str = ""

    @property
    def sure(self) -> int:
        """The number of sure tokens at its beginning."""
        return next((at for at, lead in enumerate(self.leads) if lead < LEAD), len(self.leads))

    def agrees(self, other: "Answer") -> bool:
        """Whether another answer begins with the sure tokens of this one."""
        return other.status == OK and other.tokens[: self.sure] == self.tokens[: self.sure]


def begin_again(text: str, start: int, length: int, cue: int) -> str:
    """A passage of a text, and after it its own beginning up to the end of a word, which a model continues as before.

    Raises:
        ValueError: the text is too short.
    """
    passage = text[text.index(" ", start) + 1 :][:length]
    if len(passage) < length:
        raise ValueError(f"the text has {len(text)} characters; {start + length} and a word are needed")
    return f"{passage}\n\n{passage[: passage.index(' ', cue)]}"


def long_prompts(text: str) -> list[str]:
    """Prompts that are long enough for the gate."""
    return [begin_again(text, start, TEXT_CHARACTERS, CUE_CHARACTERS) for start in LONG_STARTS]


def short_prompt(text: str) -> str:
    """A prompt that is too short for the gate."""
    return begin_again(text, SHORT_START, SHORT_CHARACTERS, SHORT_CUE_CHARACTERS)


def ask(url: str, model: str, prompt: str, tokens: int = ANSWER_TOKENS, with_leads: bool = False) -> Answer:
    """A greedy completion. Nothing of the prompt is taken from the prefix cache."""
    body: dict[str, Any] = {
        "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        "cache_salt": uuid.uuid4().hex, "return_token_ids": True,
    }  # fmt: skip
    if with_leads:
        body |= {"logprobs": 2, "return_tokens_as_token_ids": True}  # two tokens may have the same text
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    # No proxy: to a proxy that the environment names, localhost is another machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response:
            [choice] = json.load(response)["choices"]
            leads = tuple(map(_lead, choice["logprobs"]["top_logprobs"])) if with_leads else ()
            return Answer(response.status, tuple(choice["token_ids"]), leads)
    except urllib.error.HTTPError as error:
        return Answer(error.code, error=error.read().decode(errors="replace")[:SHOWN])
    except (OSError, ValueError) as error:  # no connection, or one that broke: URLError is an OSError
        return Answer(NO_ANSWER, error=repr(error)[:SHOWN])


def ask_all(url: str, model: str, text: str, with_leads: bool = False) -> list[Answer]:
    """The answers to all prompts, one after the other, so that no other request shares a step with a prompt."""
    prompts = (*long_prompts(text), short_prompt(text))
    return [ask(url, model, prompt, with_leads=with_leads) for prompt in prompts]


def all_agree(expected: list[Answer], found: list[Answer]) -> bool:
    return all(one.agrees(other) for one, other in zip(expected, found, strict=True))


def _lead(likeliest: dict[str, float]) -> float:
    first, second = sorted(likeliest.values(), reverse=True)[:2]
    return first - second
