# SPDX-License-Identifier: Apache-2.0
"""The 95% interval of a mean of few numbers, by Student's t: two standard errors would hold 91% of eight."""

import math
import statistics
from collections.abc import Sequence

LEVEL = 0.95
WIDEST = 16.0
"""Beyond the quantile of one degree of freedom."""


def of_mean(numbers: Sequence[float]) -> tuple[float, float] | None:
    """Its ends; None of a single number."""
    if len(numbers) < 2:
        return None
    mean, error = statistics.fmean(numbers), statistics.stdev(numbers) / math.sqrt(len(numbers))
    reach = t_quantile(len(numbers) - 1) * error
    return mean - reach, mean + reach


def t_quantile(degrees: int) -> float:
    """What |t| stays below with the probability LEVEL, by bisection."""
    low, high = 0.0, WIDEST
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_within(middle, degrees) < LEVEL else (low, middle)
    return high


def t_within(bound: float, degrees: int) -> float:
    """How probable |t| < bound is: finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 4)."""
    angle = math.atan(bound / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = cosine if odd else 1.0, 0.0
    for power in range(2 + odd, degrees + 1, 2):
        total += term
        term *= cosine**2 * (power - 1) / power
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
