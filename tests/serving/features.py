# SPDX-License-Identifier: Apache-2.0
"""How the tests of serving features compare an engine that runs sparse with one of vLLM's own backend."""

import json
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from tests.serving.engine_jobs import Outcome

SPARSE = "sparse gate_open"
Answer = dict[str, Any]
logger = logging.getLogger("features")


class Tolerance(NamedTuple):
    """How far the rounding of two kernels may move a single logprob, and all of them on average."""

    most: float
    mean: float


class Difference(NamedTuple):
    """How two answers differ, up to the first token that is not the same in both."""

    tokens: int
    equal: int
    most: float
    mean: float


def answers(found: list[dict[str, Any]]) -> list[Answer]:
    """All answers that an `ask` step got."""
    return [answer for prompt in found for answer in prompt["answers"]]


def served(outcome: Outcome) -> Outcome:
    assert outcome.error is None, outcome.error
    return outcome


def equal_prefix(one: list[int], other: list[int]) -> int:
    """Tokens before the first that differs."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((at for at, (a, b) in pairs if a != b), len(one))


def compare(ours: list[Answer], stock: list[Answer], tolerance: Tolerance) -> Difference:
    """Assert that answers agree up to rounding: a token may differ only where the stock engine had a near tie."""
    distances, equal = [], 0
    for mine, theirs in zip(ours, stock, strict=True):
        length = equal_prefix(mine["tokens"], theirs["tokens"])
        if length < len(theirs["tokens"]):
            assert theirs["leads"][length] <= 2 * tolerance.most, (length, mine, theirs)
        equal += length
        pairs = zip(mine["logprobs"][:length], theirs["logprobs"][:length], strict=True)
        distances += [abs(one - other) for one, other in pairs]
    difference = Difference(
        tokens=sum(len(each["tokens"]) for each in stock),
        equal=equal,
        most=max(distances, default=0.0),
        mean=sum(distances) / max(1, len(distances)),
    )
    assert difference.most <= tolerance.most and difference.mean <= tolerance.mean, difference
    assert 2 * equal >= difference.tokens, difference
    return difference


def sparse_tokens(outcome: Outcome, until: int = -1, since: int | None = None) -> int:
    """Prompt tokens that ran sparse, up to a step or between two."""
    before = 0 if since is None else outcome.counted[since][0]["tokens"].get(SPARSE, 0)
    return int(outcome.counted[until][0]["tokens"].get(SPARSE, 0) - before)


def density(outcome: Outcome, rank: int = 0) -> float:
    """The share of the causal pairs of sparse attention that one worker kept."""
    last = outcome.counted[-1][rank]
    return last["kept"] / last["causal"]


def metric(outcome: Outcome, name: str, until: int = -1) -> float:
    return outcome.metrics[until].get(f"vllm:{name}", 0)


Report = Callable[..., None]


def reporter(test: str, record_property: Callable[[str, object], None]) -> Report:
    """Writes what was compared to the log, as one line of JSON, and to pytest's XML file."""

    def report(outcome: Outcome, **found: Any) -> None:
        if outcome.counted and outcome.counted[-1][0]["causal"]:
            found |= {"sparse_tokens": sparse_tokens(outcome), "density": round(density(outcome), 4)}
        found |= {"cudagraph_mode": outcome.cudagraph_mode, "seconds": round(outcome.seconds, 1)}
        for name, value in found.items():
            record_property(name, json.dumps(value))
        logger.info(json.dumps({"test": test, **found}))

    return report
