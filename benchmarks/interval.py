# SPDX-License-Identifier: Apache-2.0
"""95% intervals. That of a mean uses Student's t, because two standard errors would hold only 91% of means of eight
numbers. That of a median uses the order of the numbers only, so their distribution does not matter."""

import math
import statistics
from collections.abc import Sequence

from minference_vllm.evals.paired import sign_test

LEVEL = 0.95
WIDEST = 16.0
"""Larger than the quantile of one degree of freedom."""
FEWEST_OF_MEDIAN = 6
"""With fewer numbers, not even the least and the greatest hold the median between them with the probability LEVEL."""


def of_mean(numbers: Sequence[float]) -> tuple[float, float] | None:
    """The ends of the mean's interval; None for a single number."""
    if len(numbers) < 2:
        return None
    mean, error = statistics.fmean(numbers), statistics.stdev(numbers) / math.sqrt(len(numbers))
    reach = t_quantile(len(numbers) - 1) * error
    return mean - reach, mean + reach


def of_median(numbers: Sequence[float]) -> tuple[float, float] | None:
    """The ends of the median's interval: outside lie the numbers that the sign test rejects. None for few numbers."""
    number = len(numbers)
    rejected = 0  # at each end
    while 2 * rejected < number and sign_test(rejected, number - rejected) <= 1 - LEVEL:
        rejected += 1
    ordered = sorted(numbers)
    return (ordered[rejected - 1], ordered[-rejected]) if rejected else None


def t_quantile(degrees: int) -> float:
    """The bound that |t| stays below with the probability LEVEL, found by bisection."""
    low, high = 0.0, WIDEST
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_within(middle, degrees) < LEVEL else (low, middle)
    return high


def t_within(bound: float, degrees: int) -> float:
    """The probability of |t| < bound: finite sums for whole degrees of freedom (Abramowitz, Stegun, 26.7.3 and 4)."""
    angle = math.atan(bound / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = cosine if odd else 1.0, 0.0
    for power in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (power - 1) / power
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
