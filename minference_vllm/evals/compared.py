# SPDX-License-Identifier: Apache-2.0
"""Samples with two servers' replies, and what the replies differ by: of a task and length, and on average over all."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from minference_vllm.evals.journal import Journal
from minference_vllm.evals.paired import compare
from minference_vllm.evals.sample import Kind, Reply, Sample
from minference_vllm.evals.scores import Scores, score

RIGHT_OR_WRONG = (Kind.ALL, Kind.ANY, Kind.FIRST_CHOICE)
"""Kinds of samples whose scores are shares of what is right, so that a mean over tasks says something."""

IN_TEXT = (Kind.ALL, Kind.ANY)
"""Those of them that are answered in text."""

CONTROL = {
    "sparse_score": "control_score",
    **{name: f"control_{name}" for name in ("loss", "low", "high", "lost", "gained")},
}
"""By the names of what a row says of the sparse server: the names of the same for the control."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One sample with the dense server's reply and another's, the sparse one's or the control's.

    Attributes:
        other: the other server's reply.
        scores: None if a server gave an error. The other server's is `scores.sparse`.
    """

    sample: Sample
    dense: Reply
    other: Reply
    scores: Scores | None


def pair(samples: Sequence[Sample], dense: Journal, other: Journal) -> list[Compared]:
    """Every sample with both replies."""
    ours, theirs = dense.replies(), other.replies()

    def compared(sample: Sample) -> Compared:
        one, two = ours[sample.id], theirs[sample.id]
        return Compared(sample, one, two, None if one.error or two.error else score(sample, one, two))

    return [compared(sample) for sample in samples]


def by_group(compared: Iterable[Compared]) -> dict[tuple[str, int], list[Compared]]:
    """Samples by task and length, in the order of their first."""
    groups: dict[tuple[str, int], list[Compared]] = {}
    for one in compared:
        groups.setdefault(one.sample.group, []).append(one)
    return groups


def scores_of(compared: Iterable[Compared]) -> list[Scores]:
    """The scores of those that have some."""
    return [one.scores for one in compared if one.scores]


def difference(groups: Sequence[Sequence[Scores]], seed: int) -> dict[str, Any]:
    """Mean scores over groups that each count as much, and what paired.Difference says of them.

    Args:
        seed: of the bootstrap.
    """
    columns = [([s.dense for s in group], [s.sparse for s in group]) for group in groups]
    dense, sparse = (statistics.fmean(map(statistics.fmean, of_groups)) for of_groups in zip(*columns, strict=True))
    return {"dense_score": dense, "sparse_score": sparse, **compare(columns, seed)._asdict()}


def as_control(found: dict[str, Any]) -> dict[str, Any]:
    """A difference between the dense server and the control, under the names that rows have for it."""
    return {name: found[ours] for ours, name in CONTROL.items()}


def mean(compared: Sequence[Compared], controlled: Sequence[Compared], seed: int) -> dict[str, Any] | None:
    """The difference over all tasks and lengths that are right or wrong; None if there are fewer than two.

    Args:
        compared: with the sparse server.
        controlled: with the control; empty if there is none.
        seed: of the bootstrap.
    """
    groups = _groups(compared)
    if len(groups) < 2:
        return None
    found = {"rows": len(groups), **difference(groups, seed), "equal_replies": _equal(compared)}
    if of_other := _groups(controlled):
        found |= as_control(difference(of_other, seed)) | {"control_equal_replies": _equal(controlled)}
    return found


def _groups(compared: Iterable[Compared]) -> list[list[Scores]]:
    """Scores by task and length, of those that are right or wrong and have some."""
    groups = by_group(one for one in compared if one.sample.kind in RIGHT_OR_WRONG and one.scores)
    return [scores_of(group) for group in groups.values()]


def _equal(compared: Iterable[Compared]) -> float | None:
    """The share of answers in text that are letter by letter the dense server's."""
    equal = [one.dense.text == one.other.text for one in compared if one.sample.kind in IN_TEXT and one.scores]
    return statistics.fmean(equal) if equal else None
