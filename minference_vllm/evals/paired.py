# SPDX-License-Identifier: Apache-2.0
"""What differences of paired scores mean: every sample is compared with itself, so its difficulty drops out."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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


def compare(groups: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int) -> Difference:
    """The mean difference of paired scores in groups, of which each counts as much as any other.

    The bootstrap draws within each group as many samples as it has, so the interval is of these groups, with other
    samples. It is None if a group has a single sample.

    Args:
        groups: dense and sparse scores of each.
        seed: of the bootstrap.
    """
    differences = [[float(one - other) for one, other in zip(*group, strict=True)] for group in groups]
    every = [difference for of_group in differences for difference in of_group]
    lost, gained = sum(d > EQUAL for d in every), sum(d < -EQUAL for d in every)
    low, high = _interval(differences, seed)
    loss = math.fsum(math.fsum(of_group) / len(of_group) for of_group in differences) / len(differences)
    return Difference(loss, low, high, lost, gained, sign_test(lost, gained))


def sign_test(lost: int, gained: int) -> float:
    """The probability of a split at least as uneven, if a changed sample is as likely to be lost as gained."""
    changed, fewer = lost + gained, min(lost, gained)
    tail = sum(math.comb(changed, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**changed)


def _interval(groups: Sequence[Sequence[float]], seed: int) -> tuple[float | None, float | None]:
    if min(map(len, groups)) < 2:
        return None, None
    numpy = need("numpy")
    lots = numpy.random.default_rng(seed)
    means = sum(_resampled_means(differences, lots) for differences in groups) / len(groups)
    low, high = numpy.percentile(means, TAILS)
    return float(low), float(high)


def _resampled_means(differences: Sequence[float], lots: Any) -> Any:
    """[RESAMPLES] means of as many differences as there are, drawn with replacement."""
    numpy = need("numpy")
    values, number = numpy.asarray(differences), len(differences)
    at_once = max(1, MOST_AT_ONCE // number)
    means = [
        values[lots.integers(0, number, (min(at_once, RESAMPLES - start), number))].mean(axis=1)
        for start in range(0, RESAMPLES, at_once)
    ]
    return numpy.concatenate(means)
