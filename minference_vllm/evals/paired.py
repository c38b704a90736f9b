# SPDX-License-Identifier: Apache-2.0
"""What differences of paired scores mean: every sample is compared with itself, so its difficulty drops out."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from minference_vllm.evals.extras import need

RESAMPLES = 10_000
MOST_AT_ONCE = 2**21  # draws
TAILS = (2.5, 97.5)  # percent: a 95% interval
EQUAL = 1e-9


class Difference(NamedTuple):
    """Dense less sparse, over samples.

    Attributes:
        loss: mean difference; above 0 where sparse is worse.
        low, high: its 95% interval by a paired bootstrap; None of a single sample.
        lost, gained: samples that are worse with sparse, or better.
        p_value: of the exact two-sided sign test on lost and gained. Where samples are right or wrong, this is
            McNemar's test.
    """

    loss: float
    low: float | None
    high: float | None
    lost: int
    gained: int
    p_value: float


def compare(dense: Sequence[float], sparse: Sequence[float], seed: int) -> Difference:
    """The difference of paired scores.

    Args:
        seed: of the bootstrap.
    """
    differences = [float(one - other) for one, other in zip(dense, sparse, strict=True)]
    lost, gained = sum(d > EQUAL for d in differences), sum(d < -EQUAL for d in differences)
    low, high = _interval(differences, seed)
    return Difference(math.fsum(differences) / len(differences), low, high, lost, gained, sign_test(lost, gained))


def sign_test(lost: int, gained: int) -> float:
    """The probability of a split at least as uneven, if a changed sample is as likely to be lost as gained."""
    changed, fewer = lost + gained, min(lost, gained)
    tail = sum(math.comb(changed, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**changed)


def _interval(differences: Sequence[float], seed: int) -> tuple[float | None, float | None]:
    if len(differences) < 2:
        return None, None
    numpy = need("numpy")
    lots, values, number = numpy.random.default_rng(seed), numpy.asarray(differences), len(differences)
    at_once = max(1, MOST_AT_ONCE // number)
    means = [
        values[lots.integers(0, number, (min(at_once, RESAMPLES - start), number))].mean(axis=1)
        for start in range(0, RESAMPLES, at_once)
    ]
    low, high = numpy.percentile(numpy.concatenate(means), TAILS)
    return float(low), float(high)
