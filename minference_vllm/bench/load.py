# SPDX-License-Identifier: Apache-2.0
"""What is sent: the same requests at every point of a sweep, and to both servers."""

import itertools
import json
import shlex
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minference_vllm.errors import ConfigError
from minference_vllm.evals.line import Line
from minference_vllm.evals.material import Material, Tokenizer, fingerprint, load_text
from minference_vllm.evals.private import without_secrets
from minference_vllm.evals.sample import Count
from minference_vllm.evals.serve import option_names
from minference_vllm.files import write_file

RANDOM, OWN_TEXT = ("--dataset-name", "random"), ("--dataset-name", "custom", "--skip-chat-template", "--ignore-eos")
DATASET_OPTION = "--dataset-name"
# Options of vllm bench serve that this command sets itself. vLLM has several spellings for lengths.
TAKEN = (
    "--base-url", "--host", "--port", "--model", "--served-model-name", "--tokenizer", "--seed", "--num-prompts",
    "--num-warmups", "--request-rate", "--max-concurrency", "--input-len", "--output-len", "--random-input-len",
    "--random-output-len", "--custom-output-len", "--extra-body", "--save-result", "--save-detailed", "--append-result",
    "--result-dir", "--result-filename",
)  # fmt: skip


class Point(Line):
    """One point of a sweep."""

    input_len: Count | None
    """Tokens of a prompt; None where the data set has lengths of its own."""
    output_len: Count | None
    rate: float | None
    """Requests a second, at random times; None where a request follows the answer to another one."""
    concurrency: Count | None
    """Requests in flight; None where they are sent at a rate."""

    @property
    def lengths(self) -> tuple[int | None, int | None]:
        return self.input_len, self.output_len

    @property
    def load(self) -> str:
        return f"{self.rate:g} a second" if self.rate is not None else f"{self.concurrency} in flight"

    @property
    def arguments(self) -> list[str]:
        """The options of vllm bench serve for this point."""
        given = {
            "--input-len": self.input_len,
            "--output-len": self.output_len,
            "--request-rate": self.rate,
            "--max-concurrency": self.concurrency,
        }
        return [f"{option}={value}" for option, value in given.items() if value is not None]


def sweep(
    input_lens: Sequence[int | None],
    output_lens: Sequence[int | None],
    rates: Sequence[float],
    in_flight: Sequence[int],
) -> list[Point]:
    """Every length at every load."""
    loads = [(rate, None) for rate in sorted(set(rates))] + [(None, count) for count in sorted(set(in_flight))]
    return [
        Point(input_len=read, output_len=written, rate=rate, concurrency=concurrency)
        for read, written, (rate, concurrency) in itertools.product(input_lens, output_lens, loads)
    ]


@dataclass(frozen=True, slots=True)
class Load:
    """What every point of a sweep has in common.

    Attributes:
        requests: number at each point.
        warmups: requests that are sent beforehand, of each pair of lengths, and not measured.
        seed: of prompts and sending times.
        tokenizer: the model's, by directory or name.
        options: further options of vllm bench serve.
        text: prompts are cut from it; None for another data set.
        folder: for the prompts that are cut from the text.
    """

    requests: int
    warmups: int
    seed: int
    tokenizer: str
    options: tuple[str, ...]
    text: Path | None
    folder: Path

    def arguments(self, point: Point, requests: int) -> list[str]:
        """What follows `vllm bench serve`, without the server and the result file.

        Prompts are the same at every point. Each run has a cache salt of its own, so that it finds no pages of another
        run.
        """
        ours = {"--tokenizer": self.tokenizer, "--seed": self.seed, "--num-prompts": requests}
        salt = json.dumps({"cache_salt": uuid.uuid4().hex})
        return [
            "--temperature=0",  # so that both servers generate alike; the user's options may override it
            *self._dataset(point),
            *self.options,
            *(f"{option}={value}" for option, value in ours.items()),
            f"--extra-body={salt}",
            *point.arguments,
        ]

    def _dataset(self, point: Point) -> Iterator[str]:
        if self.text is not None:
            yield from (*OWN_TEXT, f"--dataset-path={self._prompts(point.input_len)}")
        elif not names_dataset(self.options):
            yield from RANDOM

    def cut_prompts(self, points: Sequence[Point]) -> None:
        """Write the prompts of each length, if they come from a text.

        Raises:
            ConfigError: it cannot be read, or is too short.
        """
        if self.text is None:
            return
        text = load_text(self.text)
        tokenizer = Tokenizer(self.tokenizer)
        material = Material(tokenizer, self.tokenizer, tokenizer.encode(text), seed=self.seed)
        for tokens in {point.input_len for point in points if point.input_len is not None}:
            lots = (material.lots("bench", tokens, index) for index in range(self.requests))
            passages = (tokenizer.decode(material.passage(tokens, each)) for each in lots)
            lines = "".join(f"{json.dumps({'prompt': passage})}\n" for passage in passages)
            write_file(self._prompts(tokens), lines, str(self._prompts(tokens)))

    def _prompts(self, tokens: int | None) -> Path:
        return self.folder / f"prompts-{tokens}.jsonl"


def described(load: Load) -> dict[str, str | int | None]:
    """What this load is identified by in files and reports."""
    return {
        "requests": load.requests,
        "warmups": load.warmups,
        "seed": load.seed,
        "tokenizer": load.tokenizer,
        "options": shlex.join(without_secrets(load.options)),
        "text": None if load.text is None else fingerprint(load.text),
    }


def names_dataset(options: Sequence[str]) -> bool:
    return DATASET_OPTION in option_names(options)


def split_options(text: str) -> tuple[str, ...]:
    """Options of vllm bench serve, as a shell reads them.

    Raises:
        ConfigError: they are no options, or they choose what is chosen here.
    """
    try:
        options = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"--bench is read as a shell does, and this is no such line: {error}.") from None
    for name in option_names(options):
        if name in TAKEN:
            raise ConfigError(f"--bench may not hold {name}, which this command sets: leave it out.")
    return options
