# SPDX-License-Identifier: Apache-2.0
"""Makes the samples of an evaluation once, and writes a file: a line on how they were made, then one for each."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import Field

from minference_vllm.errors import ConfigError
from minference_vllm.evals import tasks
from minference_vllm.evals.line import Line, read_line, refuse_other
from minference_vllm.evals.material import Material, Tokenizer, fingerprint, load_prompts, load_text
from minference_vllm.evals.sample import Sample
from minference_vllm.evals.tasks import agreement, ruler
from minference_vllm.files import read_lines, write_file

FILE = "samples.jsonl"
WHAT = "a file of samples that `minference-vllm eval --prepare` made"
MAX_SEED = 2**63 - 1
TOKENIZER_FILE = "tokenizer.json"  # of most tokenizers


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be prepared.

    Attributes:
        tokenizer: directory, or name on the hub.
        tasks: names; if empty, all tasks that have what they need.
        tokens: lengths.
        samples: of each task and length.
        chat: whether questions go into the model's chat template.
        text, prompts: the user's files.
    """

    tokenizer: str
    tasks: Sequence[str]
    tokens: Sequence[int]
    samples: int
    seed: int
    chat: bool
    text: Path | None
    prompts: Path | None


class Settings(Line):
    """Everything that decides what the samples are. Files stand by fingerprints: a path says little to others."""

    tokenizer: str
    tasks: tuple[str, ...]
    tokens: tuple[int, ...]
    samples: int
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    chat: bool
    text: str | None
    prompts: str | None
    ruler: str | None
    """Where RULER's tasks come from, and who splits their essays into sentences."""


class Header(Line):
    """The first line of the file."""

    settings: Settings
    left_out: dict[str, str]
    """The tasks, or lengths of a task, without samples, each with the reason."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """The samples of a file.

    Attributes:
        sha256: of the file.
    """

    header: Header
    samples: list[Sample]
    sha256: str


def prepare(request: Request, folder: Path) -> Prepared:
    """The samples in a folder. They are made if the folder has none.

    Raises:
        ConfigError: a task lacks something, or the folder has samples of other settings.
    """
    path = folder / FILE
    settings, left_out = _settle(request)
    if os.path.lexists(path):
        found = load(folder)
        refuse_other(path, found.header.settings, settings)
        return found
    samples, failures = _make(request, settings)
    if flawed := next((sample for sample in samples if sample.flaw), None):
        raise ConfigError(f"A sample was made that cannot be scored, {flawed.id}: {flawed.flaw}.")
    header = Header(settings=settings, left_out=left_out | failures)
    if not samples:
        reasons = "; ".join(f"{name} ({why})" for name, why in header.left_out.items())
        raise ConfigError(f"No prompt could be made: {reasons}.")
    return save(folder, header, samples)


def save(folder: Path, header: Header, samples: Sequence[Sample]) -> Prepared:
    """Write the file of a folder, and give what it holds."""
    text = "".join(f"{line.model_dump_json()}\n" for line in (header, *samples))
    write_file(folder / FILE, text, str(folder / FILE))
    return load(folder)


def load(folder: Path) -> Prepared:
    """Samples that were prepared before.

    Raises:
        ConfigError: there are none in this folder.
    """
    path, digest = folder / FILE, sha256()
    header: Header | None = None
    samples: list[Sample] = []
    for number, line in enumerate(read_lines(path, str(path)), start=1):
        digest.update(line)
        where = f"{path}, line {number}"
        if header is None:
            header = read_line(Header, line, where, WHAT)
        else:
            samples.append(read_line(Sample, line, where, WHAT))
            if flaw := samples[-1].flaw:
                raise ConfigError(f"{where} has a sample that cannot be scored: {flaw}.")
    if header is None or not samples:
        raise ConfigError(f"{path} holds no samples: make them anew, by minference-vllm eval --prepare.")
    return Prepared(header, samples, digest.hexdigest())


def _settle(request: Request) -> tuple[Settings, dict[str, str]]:
    """The settings with each task by its own name, and the tasks that are left out."""
    chosen, left_out = [], {}
    for name in tasks.expand(request.tasks or tasks.NAMES):
        if lack := _lack(name, request):
            if request.tasks:
                raise ConfigError(f"The task {name} {lack}.")
            left_out[name] = lack
        else:
            chosen.append(name)
    settings = Settings(
        tokenizer=_tokenizer_of(request.tokenizer),
        tasks=tuple(chosen),
        tokens=tuple(request.tokens),
        samples=request.samples,
        seed=request.seed,
        chat=request.chat,
        text=fingerprint(request.text) if request.text else None,
        prompts=fingerprint(request.prompts) if request.prompts else None,
        ruler=ruler.describe() if _ruler_of(chosen) else None,
    )
    return settings, left_out


def _lack(name: str, request: Request) -> str:
    """What a task lacks, as the end of a sentence; empty if it lacks nothing."""
    if name in tasks.OF_TEXT and not request.text:
        return "needs a text: --text FILE"
    if name == tasks.OF_PROMPTS and not request.prompts:
        return "needs your prompts: --prompts FILE"
    if name in tasks.RULER_TASKS and not ruler.is_installed():
        return f"needs NVIDIA's generators: pip install 'minference-vllm[{ruler.EXTRA}]'"
    return ""


def _make(request: Request, settings: Settings) -> tuple[list[Sample], dict[str, str]]:
    """All samples, and the reasons why a task and length has none."""
    tokenizer = Tokenizer(request.tokenizer, request.chat)
    material = Material(
        tokenizer=tokenizer,
        tokenizer_name=request.tokenizer,
        text=tokenizer.encode(load_text(request.text, settings.text)) if request.text else [],
        prompts=load_prompts(request.prompts, settings.prompts) if request.prompts else (),
        seed=request.seed,
    )
    samples: list[Sample] = []
    for name in settings.tasks:
        if name in tasks.MAKERS:
            for tokens in request.tokens:
                samples += tasks.MAKERS[name](material, tokens, request.samples)
        elif name == tasks.OF_PROMPTS:
            samples += agreement.make_all(material)
    failures = {}
    for made in ruler.make_all(material, _ruler_of(settings.tasks), request.tokens, request.samples):
        samples += made.samples
        if made.failure:
            failures[f"{made.task} at {made.tokens} tokens"] = made.failure
    return samples, failures


def _tokenizer_of(name: str) -> str:
    """A name on the hub, or a directory's own name and what is in it."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    file = folder / TOKENIZER_FILE
    return f"{folder.name} {fingerprint(file)}" if file.exists() else folder.name


def _ruler_of(names: Sequence[str]) -> list[str]:
    return [name for name in names if name in tasks.RULER_TASKS]
