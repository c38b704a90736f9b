# SPDX-License-Identifier: Apache-2.0
"""The result of a check."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

NO_GPU = "no GPU is expected here"
"""Why checks that need a GPU are skipped while an image is built."""

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
        name: of the thing that was looked at.
        status: how it ended.
        what: the finding, or why the check was skipped.
        remedy: what to do; only warnings and failed checks have one.
        facts: the finding for programs, where `what` does not suffice; JSON values.
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
    """The server works, but not as well as it could; the remedy says what to do."""
    return Check(name, Status.WARNING, what, remedy, facts)


def failed(name: str, what: str, remedy: str, **facts: Any) -> Check:
    """Something is wrong; the remedy says what to do."""
    return Check(name, Status.FAILED, what, remedy, facts)


def skipped(name: str, why: str) -> Check:
    """The check could not be made, or means nothing here."""
    return Check(name, Status.SKIPPED, why)


def on_one_line(error: BaseException) -> str:
    """An exception's message on one line, cut off if it is long; the exception's type, if it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
