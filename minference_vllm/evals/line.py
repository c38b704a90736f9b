# SPDX-License-Identifier: Apache-2.0
"""Lines of our JSON files. The first says how the file was made; a file that was made differently is not continued."""

import fcntl
import os
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from minference_vllm.errors import ConfigError, shortened
from minference_vllm.files import read_lines, reason


class Line(BaseModel):
    """A line of a file."""

    # JSON has no NaN and no infinity: a server that sends one is at fault.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


AnyLine = TypeVar("AnyLine", bound=Line)


def read_line(kind: type[AnyLine], raw: bytes, where: str, what: str) -> AnyLine:
    """A line of a file. Messages do not repeat its content, because prompts and answers are private.

    Args:
        where: file and number of the line, for messages.
        what: what the file should be, for messages.

    Raises:
        ConfigError: it is no such line.
    """
    try:
        return kind.model_validate_json(raw, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{where} is no line of {what}: {first_fault(error, kind.__name__)}.") from None


def first_fault(error: ValidationError, whole: str) -> str:
    """The first fault and its place, without the content found there.

    Args:
        whole: the name of what was read, for faults that belong to no single field.
    """
    fault = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(shortened(part, str) for part in fault['loc']) or whole}: {fault['msg']}"


def refuse_other(path: Path, found: Line, wanted: Line) -> None:
    """Check that a file was made with the current settings.

    Raises:
        ConfigError: it was not; the message names each difference.
    """
    was, now = found.model_dump(mode="json"), wanted.model_dump(mode="json")
    differences = [f"{name} was {was[name]!r} and is now {now[name]!r}" for name in now if was[name] != now[name]]
    if differences:
        others = "; ".join(differences)
        raise ConfigError(f"{path} was made with other settings: {others}. Give the same, or another folder.")


class LineFile(Generic[AnyLine]):
    """A file whose first line says what the others belong to, so that a run which was cut off goes on where it stopped.

    It is locked for as long as this object lives: two runs at once would take each other's lines for their own.

    Args:
        path: the file; it is created, or continued if it exists.
        origin: what the lines must belong to.
        kind: the type of the lines after the first.
        what: what the file should be, for messages.

    Attributes:
        lines: the lines after the first, including those that the file held before.

    Raises:
        ConfigError: the file belongs to something else, or another run has locked it.
    """

    def __init__(self, path: Path, origin: Line, kind: type[AnyLine], what: str) -> None:
        self.path = path
        self.origin = origin
        self.lines: list[AnyLine] = []
        self._kind = kind
        self._what = what
        if not os.path.lexists(path) or os.path.isfile(path):
            self._lock()
        if not os.path.lexists(path) or not self._take():
            self._append(origin)

    def add(self, line: AnyLine) -> None:
        """Write a line at once."""
        self._append(line)
        self.lines.append(line)

    def _lock(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._locked = self.path.open("ab")
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{self.path} is in use by another run: wait for its end.") from None
        except (OSError, ValueError):
            pass  # a file that cannot be used is refused when it is read or written; some file systems have no locks

    def _append(self, line: Line) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(f"{line.model_dump_json()}\n")
                file.flush()
                os.fsync(file.fileno())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path} cannot be written: {reason(error)}.") from None

    def _take(self) -> bool:
        """Read the file and return whether it holds anything. A last line that was only half written is dropped."""
        whole, first = 0, f"{self.origin.model_dump_json()}\n".encode()
        for number, line in enumerate(read_lines(self.path, str(self.path)), start=1):
            is_cut = not line.endswith(b"\n")
            if is_cut and (number > 1 or first.startswith(line)):  # else the file is not ours
                os.truncate(self.path, whole)
                break
            whole += len(line)
            where = f"{self.path}, line {number}"
            if number > 1:
                self.lines.append(read_line(self._kind, line, where, self._what))
            else:
                refuse_other(self.path, read_line(type(self.origin), line, where, self._what), self.origin)
        return whole > 0
