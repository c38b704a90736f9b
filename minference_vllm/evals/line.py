# SPDX-License-Identifier: Apache-2.0
"""Lines of our JSON files. The first says how the file was made; a file made otherwise is never gone on with."""

import os
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from minference_vllm.errors import ConfigError, shortened
from minference_vllm.files import read_lines, reason


class Line(BaseModel):
    """A line of a file."""

    # JSON has no word for what is no number: where a server sends such a thing, that is its error.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


AnyLine = TypeVar("AnyLine", bound=Line)


def read_line(kind: type[AnyLine], raw: bytes, where: str, what: str) -> AnyLine:
    """A line of a file. What it holds is not repeated: prompts and answers are nobody else's business.

    Args:
        where: file and number of the line, for messages.
        what: the file is to be.

    Raises:
        ConfigError: it is no such line.
    """
    try:
        return kind.model_validate_json(raw, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{where} is no line of {what}: {first_fault(error, kind.__name__)}.") from None


def first_fault(error: ValidationError, whole: str) -> str:
    """The first thing that is wrong, and where; what stands there is not repeated.

    Args:
        whole: the name of what was read, for faults that are of no field.
    """
    fault = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(shortened(part, str) for part in fault['loc']) or whole}: {fault['msg']}"


def refuse_other(path: Path, found: Line, wanted: Line) -> None:
    """Check that a file was made with what is asked for now.

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

    Args:
        path: the file; it is made, or gone on with.
        origin: what the lines are to belong to.
        kind: of the lines after the first.
        what: the file is to be, for messages.

    Attributes:
        lines: after the first, those that were there already among them.

    Raises:
        ConfigError: the file belongs to something else.
    """

    def __init__(self, path: Path, origin: Line, kind: type[AnyLine], what: str) -> None:
        self.path = path
        self.origin = origin
        self.lines: list[AnyLine] = []
        self._kind = kind
        self._what = what
        if not os.path.lexists(path) or not self._take():
            self._append(origin)

    def add(self, line: AnyLine) -> None:
        """Write a line at once."""
        self._append(line)
        self.lines.append(line)

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
        """Read the file, whether it holds anything yet; what a run that was cut off left half written is dropped."""
        whole, first = 0, f"{self.origin.model_dump_json()}\n".encode()
        for number, line in enumerate(read_lines(self.path, str(self.path)), start=1):
            is_cut = not line.endswith(b"\n")
            if is_cut and (number > 1 or first.startswith(line)):  # else it is a file of someone else's
                os.truncate(self.path, whole)
                break
            whole += len(line)
            where = f"{self.path}, line {number}"
            if number > 1:
                self.lines.append(read_line(self._kind, line, where, self._what))
            else:
                refuse_other(self.path, read_line(type(self.origin), line, where, self._what), self.origin)
        return whole > 0
