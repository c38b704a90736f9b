# SPDX-License-Identifier: Apache-2.0
"""Compares servers' replies in rows by task and length, in the format of the files under benchmarks/results."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

from minference_vllm.evals.compared import CONTROL, Compared, as_control, by_group, difference, mean, pair, scores_of
from minference_vllm.evals.journal import Journal
from minference_vllm.evals.prepare import Prepared
from minference_vllm.evals.sample import Kind, Sample
from minference_vllm.evals.scores import Scores
from minference_vllm.evals.work import Work

DIGITS = 5
REPLIES = {"dense": attrgetter("dense"), "sparse": attrgetter("other")}
"""Each server's reply, of a sample that is compared with the sparse server."""
NOT_SPARSE = (
    "No prompt token ran sparse on the sparse server: what is below compares dense attention with dense attention. "
    "The prompts may be below its gate (min_seq_len, min_chunk), or it was not started with --attention-backend "
    "minference; minference_prefill_tokens_total on its /metrics gives the reasons."
)


def make_report(prepared: Prepared, dense: Journal, sparse: Journal, control: Journal | None = None) -> dict[str, Any]:
    """All figures, as JSON."""
    compared = pair(prepared.samples, dense, sparse)
    controlled = pair(prepared.samples, dense, control) if control else []
    of_control = by_group(controlled)
    seed = prepared.header.settings.seed
    found = mean(compared, controlled, seed)
    return {
        "settings": {
            **prepared.header.settings.model_dump(mode="json"),
            "samples_sha256": prepared.sha256,
            **{
                name: _described_journal(journal, prepared.samples)
                for name, journal in (("dense", dense), ("sparse", sparse), ("control", control))
                if journal
            },
        },
        "warnings": [] if sparse.work().sparse_tokens else [NOT_SPARSE],
        "left_out": prepared.header.left_out,
        "errors": list(_errors(compared, controlled)),
        "rows": [
            _row(group, members, sparse, seed) | _control(of_control.get(group, ()), seed)
            for group, members in by_group(compared).items()
        ],
        "mean": found and rounded(found),
        "depths": list(_depths(compared)),
        "positions": list(_positions(compared)),
        "prompts": list(_prompts(compared, sparse)),
    }


def reused(name: str, journal: Journal, samples: Sequence[Sample], started: str) -> list[str]:
    """What a reader must know about replies that were made before this run.

    Args:
        name: the server's.
        started: when this run began, in the form of the batches' dates.
    """
    batches = journal.batch_of_each()
    dates = sorted(batches[sample.id].date for sample in samples if batches[sample.id].date < started)
    if not dates:
        return []
    first, last = (date or "an unknown date" for date in (dates[0], dates[-1]))
    when = f"of {first}" if first == last else f"of {first} to {last}"
    return [
        f"The {name} server's replies to {len(dates)} of {len(samples)} samples are of an earlier run, {when}: card, "
        "driver, versions and commit of that time may be others than today's."
    ]


def _described_journal(journal: Journal, samples: Sequence[Sample]) -> dict[str, Any]:
    """A server, with the times of the first and the last reply that count; None where no time was noted."""
    batches = journal.batch_of_each()
    dates = {batches[sample.id].date for sample in samples}
    found = described_server(journal.origin, (batch.vllm for batch in journal.batches))
    return {**found, "replied": [min(dates), max(dates)] if all(dates) else None}


def _row(group: tuple[str, int], compared: Sequence[Compared], sparse: Journal, seed: int) -> dict[str, Any]:
    """Scores of a task and length; None where no sample has one."""
    scores = scores_of(compared)
    row: dict[str, Any] = {
        "task": group[0],
        "tokens": group[1],
        "samples": len(scores),
        "errors": len(compared) - len(scores),
        **dict.fromkeys(("dense_score", "sparse_score", "loss", "low", "high", "lost", "gained", "p_value", "kl")),
    }
    if scores:
        row |= difference([scores], seed)
        if compared[0].sample.kind is Kind.AGREEMENT:
            row["p_value"] = None  # dense is right by definition, so nothing can be gained
            row["kl"] = statistics.fmean(s.kl for s in scores if s.kl is not None)
    return rounded(row | _described(sparse.work(group)))


def _control(controlled: Sequence[Compared], seed: int) -> dict[str, Any]:
    """What a row says of the control, which is compared with the dense server as the sparse one is."""
    if not controlled:
        return {}
    scores = scores_of(controlled)
    return rounded(as_control(difference([scores], seed))) if scores else dict.fromkeys(CONTROL.values())


def _described(work: Work) -> dict[str, Any]:
    return {
        "density": work.density,
        "recall": work.recall,
        "redone": work.redone,
        "sparse_tokens": work.sparse_tokens,
        "dense_tokens": work.dense_tokens,
    }


def _depths(compared: Sequence[Compared]) -> Iterator[dict[str, Any]]:
    """Scores by task, length and depth, of tasks that hide something."""
    by_depth: dict[tuple[str, int, float], list[Scores]] = {}
    for one in compared:
        if one.sample.depth is not None and one.scores:
            by_depth.setdefault((*one.sample.group, one.sample.depth), []).append(one.scores)
    for (task, tokens, depth), scores in by_depth.items():
        means = {name: statistics.fmean(getattr(s, name) for s in scores) for name in ("dense", "sparse")}
        yield rounded({"task": task, "tokens": tokens, "depth": depth, "samples": len(scores), **means})


def _positions(compared: Sequence[Compared]) -> Iterator[dict[str, Any]]:
    """Mean negative log-probability of a token, in nats, by how far into the prompt it is."""
    groups = by_group(one for one in compared if one.sample.kind is Kind.LOGPROB and one.scores)
    for (task, tokens), members in groups.items():
        parts = len(members[0].dense.logprobs)
        for part in range(parts):
            means = {
                name: -statistics.fmean(reply(one).logprobs[part] for one in members) for name, reply in REPLIES.items()
            }
            yield rounded({"task": task, "tokens": tokens, "up_to": round(tokens * (part + 1) / parts), **means})


def _prompts(compared: Sequence[Compared], sparse: Journal) -> Iterator[dict[str, Any]]:
    """Every sample; density and recall are those of the batch that it was answered in, of one sample or more."""
    batches = sparse.batch_of_each()
    for one in compared:
        batch = batches[one.sample.id]
        yield rounded(
            {
                "task": one.sample.task,
                "tokens": one.sample.tokens,
                "id": one.sample.id,
                "prompt_tokens": one.other.prompt_tokens,
                "dense": one.scores.dense if one.scores else None,
                "sparse": one.scores.sparse if one.scores else None,
                "density": batch.work.density,
                "recall": batch.work.recall,
                "batch": len(batch.replies),
            }
        )


def _errors(compared: Sequence[Compared], controlled: Sequence[Compared]) -> Iterator[dict[str, str]]:
    replies = [(one.sample, server, reply(one)) for one in compared for server, reply in REPLIES.items()]
    replies += [(one.sample, "control", one.other) for one in controlled]
    for sample, server, reply in replies:
        if reply.error:
            yield {"id": sample.id, "server": server, "error": reply.error}


def described_server(origin: Any, versions: Iterable[str]) -> dict[str, Any]:
    """A server, by the first line of its file.

    Args:
        versions: the versions of vLLM that it reported.
    """
    return {"model": origin.model, "server": origin.server, "vllm": sorted(set(versions))}


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its numbers rounded to the digits that mean something."""
    return {name: round(value, DIGITS) if isinstance(value, float) else value for name, value in row.items()}
