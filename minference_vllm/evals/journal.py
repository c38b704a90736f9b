# SPDX-License-Identifier: Apache-2.0
"""A server's replies on disk, batch by batch, so that a run which was cut off goes on where it stopped."""

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from minference_vllm.errors import ConfigError
from minference_vllm.evals.line import Line, refuse_other
from minference_vllm.evals.sample import Reply, Sample
from minference_vllm.evals.work import Work


class Origin(Line):
    """The first line: what the replies belong to."""

    samples: str
    """SHA-256 of the file of samples."""
    model: str
    server: str
    """The server's URL, or the command that starts it."""


class Batch(Line):
    """Replies to samples of one task and length, and what the sparse path did for them."""

    task: str
    tokens: int
    vllm: str
    """The version that the server says it is."""
    replies: tuple[Reply, ...]
    work: Work


class Journal:
    """A file of batches. Each is one line, written at once: the file never holds a reply without its work.

    Args:
        path: the file; it is made, or gone on with.
        origin: what the replies are to belong to.

    Raises:
        ConfigError: the file belongs to something else.
    """

    def __init__(self, path: Path, origin: Origin) -> None:
        self.origin = origin
        self.batches: list[Batch] = []
        self._path = path
        lines = self._read() if path.exists() else []
        if lines:
            self._take(lines)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._append(origin)

    def add(self, batch: Batch) -> None:
        self._append(batch)
        self.batches.append(batch)

    def replies(self) -> dict[str, Reply]:
        """The newest reply to each sample."""
        return {reply.id: reply for batch in self.batches for reply in batch.replies}

    def left(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples that are still to be asked; those that ended in an error are."""
        replies = self.replies()
        return [sample for sample in samples if sample.id not in replies or replies[sample.id].error]

    def work(self, group: tuple[str, int] | None = None) -> Work:
        """What the sparse path did, for all samples or those of a task and length."""
        batches = (batch for batch in self.batches if group in (None, (batch.task, batch.tokens)))
        return sum((batch.work for batch in batches), start=Work())

    def _append(self, line: Line) -> None:
        with self._path.open("a") as file:
            file.write(f"{line.model_dump_json()}\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> list[bytes]:
        """The lines of the file; what a run that was cut off left half written is dropped."""
        raw = self._path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            os.truncate(self._path, whole)
        return raw[:whole].splitlines()

    def _take(self, lines: list[bytes]) -> None:
        try:
            found = Origin.model_validate_json(lines[0])
            self.batches = [Batch.model_validate_json(line) for line in lines[1:]]
        except ValidationError as error:
            raise ConfigError(f"{self._path} is no file of replies of this version: {error}") from None
        refuse_other(self._path, found, self.origin)
