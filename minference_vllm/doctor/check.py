# SPDX-License-Identifier: Apache-2.0
"""What a check says."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

NO_GPU = "no GPU is expected here"
"""Why a check is skipped that needs one, while an image is built."""

LONGEST = 400  # characters of an exception that a check repeats


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: of the thing.
        status: how it ended.
        what: was found, or why it was skipped.
        remedy: what to do; of a warning and of a failed check only.
        facts: the same for programs, where `what` is not enough; values as JSON has them.
    """

    name: str
    status: Status
    what: str
    remedy: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def ok(name: str, what: str, **facts: Any) -> Check:
    """All is as it should be."""
    return Check(name, Status.OK, what, facts=facts)


def warning(name: str, what: str, remedy: str, **facts: Any) -> Check:
    """It serves, if not as it might; the remedy says what to do."""
    return Check(name, Status.WARNING, what, remedy, facts)


def failed(name: str, what: str, remedy: str, **facts: Any) -> Check:
    """Something is wrong; the remedy says what to do."""
    return Check(name, Status.FAILED, what, remedy, facts)


def skipped(name: str, why: str) -> Check:
    """It could not be looked at, or means nothing here."""
    return Check(name, Status.SKIPPED, why)


def on_one_line(error: BaseException) -> str:
    """What an exception says on one line, and not all of it if it is long; its type, if it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
