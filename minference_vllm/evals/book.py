# SPDX-License-Identifier: Apache-2.0
"""A file of results, entry by entry, so that a run which was cut off goes on where it stopped."""

import os
from pathlib import Path
from typing import Generic, TypeVar

from minference_vllm.errors import ConfigError
from minference_vllm.evals.line import Line, read_line, refuse_other
from minference_vllm.files import read_lines, reason

Entry = TypeVar("Entry", bound=Line)


class Book(Generic[Entry]):
    """Entries after a first line that says what they belong to. Each is one line, written at once: whole or not there.

    Args:
        path: the file; it is made, or gone on with.
        origin: what the entries are to belong to.
        kind: of an entry.
        what: the file is, for messages.

    Raises:
        ConfigError: the file belongs to something else.
    """

    def __init__(self, path: Path, origin: Line, kind: type[Entry], what: str) -> None:
        self.entries: list[Entry] = []
        self._path, self._first, self._kind, self._what = path, origin, kind, what
        if not os.path.lexists(path) or not self._take():
            self._append(origin)

    def add(self, entry: Entry) -> None:
        self._append(entry)
        self.entries.append(entry)

    def _append(self, line: Line) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(f"{line.model_dump_json()}\n")
                file.flush()
                os.fsync(file.fileno())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self._path} cannot be written: {reason(error)}.") from None

    def _take(self) -> bool:
        """Read the file, whether it holds anything yet; what a run that was cut off left half written is dropped."""
        whole = 0
        first = f"{self._first.model_dump_json()}\n".encode()
        for number, line in enumerate(read_lines(self._path, str(self._path)), start=1):
            is_cut = not line.endswith(b"\n")
            if is_cut and (number > 1 or first.startswith(line)):  # else it is a file of someone else's
                os.truncate(self._path, whole)
                break
            whole += len(line)
            where = f"{self._path}, line {number}"
            if number > 1:
                self.entries.append(read_line(self._kind, line, where, self._what))
            else:
                refuse_other(self._path, read_line(type(self._first), line, where, self._what), self._first)
        return whole > 0
