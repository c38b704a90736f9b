# SPDX-License-Identifier: Apache-2.0
"""A client for the OpenAI API of a vLLM server: asks for what each kind of sample needs."""

import itertools
import json
import os
import statistics
import uuid
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from minference_vllm.errors import ConfigError
from minference_vllm.evals.errors import ServerError
from minference_vllm.evals.extras import need
from minference_vllm.evals.private import of_url
from minference_vllm.evals.sample import POSITIONS, Kind, Reply, Sample, Step
from minference_vllm.evals.work import Work, parse

API_KEY = "OPENAI_API_KEY"
RETRIES = 3  # after connection errors, timeouts, and statuses that ask for another try
GET_TIMEOUT_S = 30
LIKELIEST = 20  # the most that vLLM lists by default
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
SHOWN = 500  # characters of an error


class Client:
    """Safe to use from several threads.

    Args:
        url: the server's, with or without /v1.
        model: as the API names it.
        timeout_s: seconds for one answer.
        or_the_only: whether to take the one model that is served, whatever its name.

    Raises:
        ConfigError: the server cannot be reached, or does not serve the model.
    """

    def __init__(self, url: str, model: str, timeout_s: float, or_the_only: bool = False) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.shown_url = of_url(self.url)
        self.timeout_s = timeout_s
        openai = need("openai")
        self._errors = openai
        try:
            parts = urlsplit(self.url)
        except ValueError as error:
            raise ConfigError(f"{self.shown_url} is no URL: {error}.") from None
        if parts.scheme not in ("http", "https"):
            shown = self.url.rpartition("@")[2]  # without a scheme, of_url sees no password in it
            raise ConfigError(f"{shown} is no URL of a server: write http://HOST:PORT.")
        self._api = openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=os.environ.get(API_KEY, "unused"),
            timeout=timeout_s,
            max_retries=RETRIES,
            # No proxy for this machine's own addresses: to a proxy, localhost is another machine.
            http_client=openai.DefaultHttpxClient(trust_env=parts.hostname not in THIS_MACHINE),
        )
        self.model = self._served(model, or_the_only)

    def close(self) -> None:
        self._api.close()

    def work(self) -> Work:
        """What the sparse path has done so far.

        Raises:
            ServerError: the server cannot be reached, or has no metrics.
        """
        return parse(self._get("/metrics"))

    def version(self) -> str:
        """vLLM's version, as the server reports it.

        Raises:
            ServerError: the server does not report it.
        """
        try:
            return str(json.loads(self._get("/version"))["version"])
        except (LookupError, TypeError, ValueError):
            raise ServerError(f"{self.shown_url}/version does not say a version, as vLLM's does.") from None

    def reply(self, sample: Sample) -> Reply:
        """The server's reply, or its error.

        Raises:
            ServerError: it cannot be reached.
        """
        try:
            return self._read(sample, self._ask(sample))
        except self._errors.APITimeoutError:
            return Reply(id=sample.id, error=f"no answer in {self._api.timeout} s")
        except self._errors.APIConnectionError as error:
            raise ServerError(f"{self.shown_url} cannot be reached any more: {error}") from None
        except (self._errors.APIError, ValueError) as error:
            return Reply(id=sample.id, error=str(error)[:SHOWN] or type(error).__name__)

    def _ask(self, sample: Sample) -> Any:
        # The salt prevents the reuse of cached pages: they depend on the keys chosen for another prompt.
        extra: dict[str, Any] = {"cache_salt": uuid.uuid4().hex}
        if isinstance(sample.prompt, str):
            extra["add_special_tokens"] = sample.add_special_tokens
        if sample.kind.reads_prompt:
            extra["prompt_logprobs"] = 0  # of the prompt's own tokens
        options: dict[str, Any] = {}
        if sample.kind is Kind.AGREEMENT:
            options["logprobs"] = LIKELIEST
            extra["return_tokens_as_token_ids"] = True  # two tokens may have the same text
        return self._api.completions.create(
            model=self.model,
            prompt=sample.prompt if isinstance(sample.prompt, str) else list(sample.prompt),
            max_tokens=sample.max_tokens,
            temperature=0,
            seed=0,
            extra_body=extra,
            **options,
        )

    def _read(self, sample: Sample, completion: Any) -> Reply:
        choice = completion.choices[0]
        found: dict[str, Any] = {"id": sample.id, "prompt_tokens": completion.usage.prompt_tokens, "text": choice.text}
        if sample.kind.reads_prompt:
            entries = list(_own_entries(sample.prompt, getattr(choice, "prompt_logprobs", None)))
            found["text"] = ""
            if sample.kind is Kind.LOGPROB:
                found["logprobs"] = _in_parts([entry["logprob"] for entry in entries])
            else:  # the first token has no entry
                found["first_choices"] = tuple(entries[at - 1]["rank"] == 1 for at in sample.answers)
        elif sample.kind is Kind.AGREEMENT:
            listed = choice.logprobs
            if listed is None:
                raise ValueError("the server sent no logprobs; vLLM does unless --max-logprobs is below 20")
            pairs = zip(listed.tokens, listed.top_logprobs, strict=True)
            found["steps"] = tuple(Step(token=token, likeliest=likeliest) for token, likeliest in pairs)
        return Reply(**found)

    def _get(self, path: str) -> str:
        try:
            return self._api.get(f"{self.url}{path}", cast_to=str, options={"timeout": GET_TIMEOUT_S})
        except self._errors.APIError as error:
            raise ServerError(f"{self.shown_url}{path} cannot be read: {error}") from None

    def _served(self, model: str, or_the_only: bool) -> str:
        try:
            served = [str(entry.id) for entry in self._api.models.list()]
        except self._errors.APIError as error:
            raise ConfigError(f"{self.shown_url} does not answer as a server with OpenAI's API: {error}") from None
        except (AttributeError, TypeError, ValueError):  # the client took another page for a reply
            raise ConfigError(f"{self.shown_url} does not answer as a server with OpenAI's API.") from None
        if model in served:
            return model
        if or_the_only and len(served) == 1:
            return str(served[0])
        raise ConfigError(f"{self.shown_url} serves {', '.join(served)}, not {model}: name one of them by --model.")


def _own_entries(prompt: Sequence[int] | str, listed: Any) -> Iterator[dict[str, Any]]:
    """The entry of each token of a prompt after the first.

    Raises:
        ValueError: the server sent no entries, or those of other tokens.
    """
    if not listed or len(listed) != len(prompt):
        raise ValueError(f"the server sent prompt_logprobs of {len(listed or ())} tokens; the prompt has {len(prompt)}")
    for token, entries in zip(prompt[1:], listed[1:], strict=True):
        if str(token) not in entries:
            raise ValueError(f"the server sent no log-probability of the prompt's token {token}")
        yield entries[str(token)]


def _in_parts(logprobs: Sequence[float]) -> tuple[float, ...]:
    """The mean log-probability in each of POSITIONS equal parts."""
    edges = [round(part * len(logprobs) / POSITIONS) for part in range(POSITIONS + 1)]
    return tuple(statistics.fmean(logprobs[low:high]) for low, high in itertools.pairwise(edges))
