# SPDX-License-Identifier: Apache-2.0
"""Commands that the documents show are taken as they stand there, and their links lead somewhere."""

import argparse
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minference_vllm import cli

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "configs/README.md",
    ROOT / "benchmarks/results/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))
# An indented line of its own, with the lines that it is continued on.
COMMAND = re.compile(r"^ {4,}((?:minference-vllm|python -m benchmarks\.)(?:[^\n]*\\\n)*[^\n]*)$", re.MULTILINE)
RESULT = re.compile(r"--out benchmarks/results/([\w-]+\.json)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


class ParsedError(Exception):
    """A command line was taken; nothing of it has run."""


def commands(paths: list[Path]) -> Iterator[Any]:
    for path in paths:
        for found in COMMAND.findall(path.read_text()):
            words = shlex.split(found.replace("\\\n", " "), comments=True)
            yield pytest.param(words, id=f"{path.relative_to(ROOT)}: {' '.join(words[:4])}")


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(page.read_text())}


@pytest.fixture
def only_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No command does more than read its command line."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(*arguments: Any) -> None:
        parse_args(*arguments)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)


@pytest.mark.usefixtures("only_parsed")
@pytest.mark.parametrize("words", list(commands([*PAGES, *BENCHMARKS])))
def test_a_command_that_is_shown_is_taken(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[0] == "minference-vllm":
        with pytest.raises(ParsedError):
            cli.main(words[1:])
    else:
        module = importlib.import_module(words[2])
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{words[2]}.__main__")
        monkeypatch.setattr(sys, "argv", words[2:])
        with pytest.raises(ParsedError):
            module.main()


def test_commands_of_both_kinds_are_found() -> None:
    found = {tuple(parameter.values[0][:3]) for parameter in commands([*PAGES, *BENCHMARKS])}
    assert {words[1] for words in found} == {"doctor", "tune", "eval", "bench", "plot", "patterns", "search", "-m"}
    assert ("python", "-m", "benchmarks.fidelity") in found


def test_a_result_that_a_program_would_make_is_there_or_said_to_be_missing() -> None:
    results = ROOT / "benchmarks" / "results"
    made = {name for path in (ROOT / "benchmarks").rglob("*.py") for name in RESULT.findall(path.read_text())}
    _, _, section = (results / "README.md").read_text().partition("## Not measured yet\n")
    missing = set(re.findall(r"^\| `([\w-]+\.json)` \|", section, re.MULTILINE))
    assert len(made) > 10
    assert missing == {name for name in made if not (results / name).is_file()}


@pytest.mark.usefixtures("only_parsed")
def test_an_option_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(SystemExit):
        cli.main(["tune", "--no-such-option"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        path, _, anchor = target.partition("#")
        if not path.startswith("https://"):
            where = page.parent / path if path else page
            assert where.exists(), target
            assert not anchor or anchor in anchors(where), target
