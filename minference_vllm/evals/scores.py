# SPDX-License-Identifier: Apache-2.0
"""Scores of one sample, of which larger is better, and how far the two servers' next tokens differ."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from minference_vllm.evals.sample import Kind, Reply, Sample, Step


class Scores(NamedTuple):
    """Of one sample.

    Attributes:
        dense, sparse: how good each server's reply is.
        kl: lower bound of the mean Kullback-Leibler divergence of sparse next tokens from dense; None if unasked.
    """

    dense: float
    sparse: float
    kl: float | None = None


def score(sample: Sample, dense: Reply, sparse: Reply) -> Scores:
    """Scores of a sample that both servers have answered."""
    if sample.kind is not Kind.AGREEMENT:
        return Scores(score_alone(sample, dense), score_alone(sample, sparse))
    equal = _equal_steps(dense.steps, sparse.steps)
    agreement = equal / len(dense.steps) if dense.steps else float(not sparse.steps)
    # Up to the first difference, both servers continue from the same tokens; after it, from different ones.
    pairs = list(zip(dense.steps, sparse.steps, strict=False))[: equal + 1]
    kl = statistics.fmean(least_kl(ours.likeliest, theirs.likeliest) for ours, theirs in pairs) if pairs else 0.0
    return Scores(1.0, agreement, kl)


def least_kl(p: dict[str, float], q: dict[str, float]) -> float:
    """A lower bound of the divergence of q from p, from the log-probabilities of their likeliest tokens.

    Tokens that only one of them lists are merged with all tokens that neither lists. Merging tokens never increases the
    divergence of two distributions, so the result is a lower bound.
    """
    common = p.keys() & q.keys()
    p_rest, q_rest = (max(1.0 - sum(math.exp(some[token]) for token in common), 0.0) for some in (p, q))
    kl = sum(math.exp(p[token]) * (p[token] - q[token]) for token in common)
    if p_rest > 0 and q_rest > 0:
        kl += p_rest * math.log(p_rest / q_rest)
    return max(kl, 0.0)


def score_alone(sample: Sample, reply: Reply) -> float:
    """The score of one server's reply, for all kinds but agreement, which takes both servers' replies."""
    match sample.kind:
        case Kind.FIRST_CHOICE:
            return statistics.fmean(reply.first_choices)
        case Kind.LOGPROB:
            return statistics.fmean(reply.logprobs)
    answer = reply.text.lower()
    held = [reference.lower() in answer for reference in sample.references]
    return float(any(held)) if sample.kind is Kind.ANY else statistics.fmean(held)


def _equal_steps(dense: Sequence[Step], sparse: Sequence[Step]) -> int:
    """The number of equal tokens before the first difference."""
    pairs = enumerate(zip(dense, sparse, strict=False))
    return next((at for at, (one, other) in pairs if one.token != other.token), min(len(dense), len(sparse)))
