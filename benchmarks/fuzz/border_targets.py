# SPDX-License-Identifier: Apache-2.0
"""Things that are no regular files, in place of each file that a user may name; and the command line."""

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as some

from benchmarks.fuzz.evaluation_targets import ORIGIN
from benchmarks.fuzz.server_targets import GEOMETRY, PATTERN
from benchmarks.fuzz.target import Target, Trial
from benchmarks.fuzz.values import WORDS
from minference_vllm import cli
from minference_vllm.config import CONFIG_FILE_VARIABLE, load_config
from minference_vllm.errors import LONGEST_MESSAGE, ConfigError
from minference_vllm.evals import prepare
from minference_vllm.evals.journal import Journal
from minference_vllm.evals.material import fingerprint, load_prompts, load_text
from minference_vllm.patterns import read_pattern
from minference_vllm.patterns.published import FOLDER, NAMES, published
from minference_vllm.tuning.gate import write_gate

LARGE = 2**30  # bytes of a file that takes no space on disk
LONGEST_USAGE = 4000  # characters that argparse may put before its message

READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "settings": ("settings.json", lambda file: load_config(None, {CONFIG_FILE_VARIABLE: str(file)})),
    "pattern": ("pattern.json", read_pattern),
    "release": (f"{FOLDER}/{NAMES}", lambda file: list(published(file.parents[len(Path(FOLDER).parts)]))),
    "samples": (prepare.FILE, lambda file: prepare.load(file.parent)),
    "replies": ("sparse.jsonl", lambda file: Journal(file, ORIGIN)),
    "text": ("text.txt", load_text),
    "packed text": ("text.xz", load_text),
    "prompts": ("prompts.jsonl", load_prompts),
    "fingerprint": ("tokenizer.json", fingerprint),
    "gate": ("minference.json", lambda file: write_gate(file, GEOMETRY.head_dim)),
}


def _sparse_file(file: Path) -> None:
    file.touch()
    os.truncate(file, LARGE)


KINDS: dict[str, Callable[[Path], object]] = {
    "nothing": lambda file: None,
    "folder": lambda file: file.mkdir(),
    "pipe": lambda file: os.mkfifo(file),
    "loop": lambda file: file.symlink_to(file.name),
    "link to nothing": lambda file: file.symlink_to("none"),
    "zeros without end": lambda file: file.symlink_to("/dev/zero"),
    "noise without end": lambda file: file.symlink_to("/dev/urandom"),
    "null": lambda file: file.symlink_to("/dev/null"),
    "large": _sparse_file,
    "empty": lambda file: file.touch(),
    "process": lambda file: file.symlink_to("/proc/self/mem"),
}


def no_file(folder: Path, case: tuple[str, str]) -> Trial:
    reader, kind = case
    name, read = READERS[reader]
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    KINDS[kind](file)
    return lambda: read(file), [folder, Path("/dev/zero"), Path("/dev/urandom"), Path("/dev/null"), Path("/proc")]


def odd_name(folder: Path, case: tuple[str, str]) -> Trial:
    reader, name = case
    file = folder / name / READERS[reader][0]
    return lambda: READERS[reader][1](file), [folder, folder / name]


# The command line


def command(folder: Path, case: list[str]) -> Trial:
    """A command that ends before it would start vLLM, measure on a GPU or call a server."""
    arguments = [part.replace("FOLDER", str(folder)) for part in case]
    (folder / "good").mkdir()
    (folder / "settings.json").write_text("{}")
    (folder / "pattern.json").write_text(json.dumps(PATTERN))

    def act() -> object:
        said = io.StringIO()
        # Encodes strictly, as a terminal does.
        shown = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
            try:
                status = cli.main(arguments)
            except SystemExit as ended:  # argparse
                status = int(ended.code or 0)
        if status and len(said.getvalue()) > LONGEST_MESSAGE + LONGEST_USAGE:
            raise AssertionError(f"{len(said.getvalue())} characters on stderr")
        if status:
            raise ConfigError(said.getvalue()[-LONGEST_MESSAGE:])
        return status

    return act, [folder, *map(Path, arguments)]


FIXED = {
    "tune": ("tune",),  # without heads it stops before it measures
    "show": ("patterns", "show"),
    "published": ("patterns", "published"),
    "eval": ("eval", "--model", "m", "--prepared", "FOLDER/good", "--out", "FOLDER/out"),
}
OPTIONS = (
    "--out",
    "--model",
    "--lengths",
    "--chunk",
    "--repeats",
    "--tensor-parallel-size",
    "--dense",
    "--serve",
    "--serve-sparse",
    "--tokens",
    "--samples",
    "--seed",
    "--tasks",
    "--text",
    "--prompts",
    "--tokenizer",
    "--chat",
    "--timeout",
    "--concurrency",
    "--prepare",
    "--api-key",
    "-h",
    "--",
    "--help",
    "--no-such-option",
)
words = some.sampled_from(
    (
        *(word for word in WORDS if "\0" not in word and "\ud800" not in word),
        "FOLDER",
        "FOLDER/none",
        "FOLDER/settings.json",
        "FOLDER/good",
        "'",
        '"a',
        "--api-key k",
        "-1",
        "9" * 5000,
        "http://[::1",
        "\u0663",
        "{}",
        "[",
    )
)
commands = some.tuples(
    some.sampled_from(sorted(FIXED)),
    some.lists(
        some.one_of(words, some.sampled_from(OPTIONS), some.text(some.characters(categories=("L", "N", "S")))),
        max_size=6,
    ),
).map(lambda drawn: [*FIXED[drawn[0]], *drawn[1]])
GOOD = ["patterns", "show", "FOLDER/pattern.json"], ["eval", "--help"], ["--help"]
NAMES_OF_FILES = (
    "a\0b",
    "\ud800",
    "\udcff",
    "x" * 300,
    "x/" * 3000,
    "\n",
    "\x1b[31m",
    "\u202e",
    "..",
    "none",
    "{name}",
    "%s",
)
readers = some.sampled_from(sorted(READERS))
TARGETS = (
    Target(
        "files that are none",
        some.tuples(readers, some.sampled_from(sorted(KINDS))),
        no_file,
        len(READERS) * len(KINDS),
    ),
    Target(
        "names of files",
        some.tuples(readers, some.sampled_from(NAMES_OF_FILES)),
        odd_name,
        len(READERS) * len(NAMES_OF_FILES),
    ),
    Target("command line", commands | some.sampled_from(GOOD), command),
)
