# SPDX-License-Identifier: Apache-2.0
"""Whatever users hand to the plugin is taken, or refused with one sentence; and the fuzz sees where it is not."""

import itertools
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from minference_vllm.errors import ConfigError
from tests.conftest import import_or_skip

import_or_skip("hypothesis")

from benchmarks.fuzz import watch  # noqa: E402
from benchmarks.fuzz.__main__ import TARGETS  # noqa: E402
from benchmarks.fuzz.target import Target, search  # noqa: E402
from benchmarks.fuzz.watch import CANARY, Fault, examine  # noqa: E402

CASES = 25  # of each target


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_hostile_input_is_accepted_or_refused_with_a_sentence(target: Target) -> None:
    found = search(target, CASES)
    assert dict(found.faults) == {}
    assert found.refused > CASES // 10  # the cases are hostile,
    assert found.accepted  # and near enough to what is right


# What the fuzz must see


def test_a_sentence_is_no_fault_and_nothing_raised_is_acceptance() -> None:
    def refuse() -> None:
        raise ConfigError("x must be y.")

    assert not examine(refuse, ())
    assert examine(lambda: None, ())


def test_an_exception_is_a_fault_that_names_its_line() -> None:
    with pytest.raises(Fault, match="KeyError"):
        examine(lambda: {}["key"], ())


@pytest.mark.parametrize("sentence", ["", "x" * 5000, "two\nlines", "\x1b[31mred", "half of a \ud800"])
def test_a_message_that_is_no_sentence_is_a_fault(sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise watch.ServerError(sentence)  # as it was given: a ConfigError would mend it

    with pytest.raises(Fault, match="message"):
        examine(refuse, ())


def test_a_file_that_nobody_named_is_a_fault(tmp_path: Path) -> None:
    named, other = tmp_path / "named", tmp_path / "other"
    for file in (named, other):
        file.write_text("")
    assert examine(named.read_text, [named])
    with pytest.raises(Fault, match="other'"):
        examine(other.read_text, [named])


def test_a_secret_in_a_log_line_is_a_fault() -> None:
    with pytest.raises(Fault, match="logged"):
        examine(lambda: logging.getLogger("vllm.minference.x").warning("key %s", CANARY), ())


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda: time.sleep(10), "Overdue"),
        (lambda: [0 for _ in itertools.count() if False], "Overdue"),
        (lambda: bytearray(2**31), "MemoryError"),
    ],
    ids=["waiting", "computing", "memory"],
)
def test_time_and_memory_have_bounds(act: Callable[[], object], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "MOST_SECONDS", 0.2)
    monkeypatch.setattr(watch, "MOST_WAIT", 1.0)
    with pytest.raises(Fault, match=said):
        examine(act, ())
