# SPDX-License-Identifier: Apache-2.0
"""A server's replies on disk, batch by batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from minference_vllm.errors import ConfigError
from minference_vllm.evals.line import Line, LineFile
from minference_vllm.evals.sample import Count, Reply, Sample
from minference_vllm.evals.work import COUNTS, Work

MOST_WORK = 2**63
WHAT = "a file of replies of this version"


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
    tokens: Count
    vllm: str
    """The version that the server says it is."""
    replies: tuple[Reply, ...]
    work: Work
    date: Annotated[str, Field(max_length=40)] = ""
    """When the last of them came; empty in files of versions that did not note it."""

    @field_validator("work")
    @classmethod
    def _can_be_added(cls, work: Work) -> Work:
        if any(abs(getattr(work, name)) > MOST_WORK for name in COUNTS):
            raise PydanticCustomError("work", "no server counts so far", {})
        return work


class Journal:
    """A file of batches, so that replies are never stored without what was counted for them. See LineFile."""

    def __init__(self, path: Path, origin: Origin) -> None:
        self.origin = origin
        self._file = LineFile(path, origin, Batch, WHAT)

    @property
    def batches(self) -> list[Batch]:
        return self._file.lines

    def add(self, batch: Batch) -> None:
        self._file.add(batch)

    def replies(self) -> dict[str, Reply]:
        """The newest reply to each sample."""
        return {reply.id: reply for batch in self.batches for reply in batch.replies}

    def batch_of_each(self) -> dict[str, Batch]:
        """The batch that the newest reply to each sample came in."""
        return {reply.id: batch for batch in self.batches for reply in batch.replies}

    def refuse_misfits(self, samples: Sequence[Sample]) -> None:
        """Check that all replies can be scored.

        Raises:
            ConfigError: one cannot.
        """
        replies = self.replies()
        for sample in samples:
            reply = replies.get(sample.id)
            if reply is not None and not reply.error and not reply.fits(sample):
                raise ConfigError(
                    f"{self._file.path} has a reply to {sample.id} that is none to it: take another folder."
                )

    def left(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples that still need a reply, including those whose reply was an error."""
        replies = self.replies()
        return [sample for sample in samples if sample.id not in replies or replies[sample.id].error]

    def work(self, group: tuple[str, int] | None = None) -> Work:
        """What the sparse path did, for all samples or those of a task and length."""
        batches = (batch for batch in self.batches if group in (None, (batch.task, batch.tokens)))
        return sum((batch.work for batch in batches), start=Work())
