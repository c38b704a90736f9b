# SPDX-License-Identifier: Apache-2.0
"""Something that reads what users hand it, and the cases that it is tried with."""

import tempfile
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

from benchmarks.fuzz.watch import CANARY, Fault, examine

Trial = tuple[Callable[[], object], Collection[Path]]
"""What is tried, and the files and folders that it names to the plugin."""


@dataclass(frozen=True, slots=True)
class Target:
    """Attributes:
    name: for the result.
    cases: the inputs.
    trial: the trial of a case; it may write into a folder of its own.
    most: number of cases that there are; None if there is no end of them.
    """

    name: str
    cases: SearchStrategy[Any]
    trial: Callable[[Path, Any], Trial]
    most: int | None = None


@dataclass(slots=True)
class Found:
    """The result of many cases: how many were accepted and refused, and how often each thing went wrong."""

    accepted: int = 0
    refused: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    @property
    def cases(self) -> int:
        return self.accepted + self.refused + self.faults.total()


def search(target: Target, cases: int) -> Found:
    """Try about `cases` cases, the same each time; fewer, if there are not so many different ones."""
    found = Found()

    @settings(
        max_examples=cases, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(target.cases)
    def each(case: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
            named, others = Path(scratch, "named"), Path(scratch, "others")
            named.mkdir()
            others.mkdir()
            (others / f"{CANARY}.json").write_text(f'{{"{CANARY}": 0}}')
            act, files = target.trial(named, case)
            try:
                accepted = examine(act, files)
            except Fault as fault:
                found.faults[str(fault).replace(scratch, "…")] += 1
            else:
                found.accepted += accepted
                found.refused += not accepted

    each()
    return found
