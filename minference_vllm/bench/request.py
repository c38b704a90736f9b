# SPDX-License-Identifier: Apache-2.0
"""What came of each request, from the file that `vllm bench serve --save-detailed` writes."""

from pathlib import Path

from pydantic import BaseModel, ValidationError

from minference_vllm.bench.load import Point
from minference_vllm.errors import ConfigError, shortened
from minference_vllm.evals.line import Line, first_fault
from minference_vllm.evals.work import Work
from minference_vllm.files import read_file

MOST_RESULT_BYTES = 2**30
NO_TOKEN = "no token came"


class Request(Line):
    """One request. Its times are in seconds, counted from when it was sent."""

    input_tokens: int
    output_tokens: int
    ttft: float
    """Time of the first token."""
    latency: float
    """Time of the last token."""
    gaps: tuple[float, ...]
    """Times between two consecutive pieces of the answer. With speculative decoding, a piece may be several tokens."""
    error: str = ""
    """Why there is no answer; the other fields then mean nothing."""


class Measured(Line):
    """A point of the sweep on one server."""

    point: Point
    vllm: str
    """The version that the server says it is."""
    duration: float
    """Seconds from the first request to the last answer."""
    requests: tuple[Request, ...]
    work: Work

    @property
    def answered(self) -> list[Request]:
        return [request for request in self.requests if not request.error]


class Result(BaseModel):
    """The parts of the file that we read."""

    duration: float
    completed: int
    input_lens: list[int]
    output_lens: list[int]
    ttfts: list[float]
    itls: list[list[float]]
    latencies: list[float]
    errors: list[str]


def read_result(path: Path) -> tuple[float, tuple[Request, ...]]:
    """Duration and requests, in the order of the prompts.

    Raises:
        ConfigError: it is no such file.
    """
    raw = read_file(path, str(path), MOST_RESULT_BYTES)
    try:
        result = Result.model_validate_json(raw)
        columns = (result.input_lens, result.output_lens, result.ttfts, result.latencies, result.itls, result.errors)
        requests = tuple(_request(*row) for row in zip(*columns, strict=True))
    except ValueError as error:
        raise ConfigError(f"{path} is no result of vllm bench serve that can be read: {_first(error)}.") from None
    answered = sum(not request.error for request in requests)
    if answered != result.completed:
        raise ConfigError(f"{path} has {answered} answers, and says that {result.completed} requests were completed.")
    return result.duration, requests


def _request(read: int, written: int, ttft: float, latency: float, gaps: list[float], error: str) -> Request:
    # vLLM's client notes the traceback of an exception, and an empty reason where a proxy sent none.
    lines = error.split("\n") if error else []
    told = next((line for line in reversed(lines) if line.strip()), "" if ttft > 0 else NO_TOKEN)
    if told:
        return Request(input_tokens=read, output_tokens=0, ttft=0, latency=0, gaps=(), error=shortened(told, str))
    return Request(input_tokens=read, output_tokens=written, ttft=ttft, latency=latency, gaps=tuple(gaps))


def _first(error: ValueError) -> str:
    return first_fault(error, "it") if isinstance(error, ValidationError) else shortened(error, str)
