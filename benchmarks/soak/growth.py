# SPDX-License-Identifier: Apache-2.0
"""Whether memory grows: the slope of a line through samples, its confidence interval, and a step between two thirds."""

import itertools
import math
from dataclasses import dataclass
from statistics import NormalDist, median

FEWEST = 16
"""With fewer samples, no slope is computed."""

CONFIDENCE = 0.95
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Growth:
    """How memory grew.

    Attributes:
        per_hour, low, high: MiB an hour in the second half, with the ends of the confidence interval.
        level: MiB, the median of the middle third.
        step: MiB by which the median of the last third exceeds that level. In a few minutes, when slopes are lost in
            noise, the step still shows growth, because waves and single samples hardly move a median.
    """

    per_hour: float
    low: float
    high: float
    level: float = 0.0
    step: float = 0.0


def growth(times_s: list[float], mib: list[float]) -> Growth | None:
    """The slope over the second half of the samples, by least squares, and the step; None if there are too few samples.

    Memory rises and falls in waves that are longer than the time between samples, so neighbours carry partly the same
    information. The interval counts as many independent samples as their residuals' correlation r leaves: n (1 - r) /
    (1 + r).
    """
    times, values = times_s[len(times_s) // 2 :], mib[len(mib) // 2 :]
    if len(times) < FEWEST:
        return None
    mean_time, mean = sum(times) / len(times), sum(values) / len(values)
    spread = sum((time - mean_time) ** 2 for time in times)
    slope = sum((time - mean_time) * (value - mean) for time, value in zip(times, values, strict=True)) / spread
    residuals = [value - mean - slope * (time - mean_time) for time, value in zip(times, values, strict=True)]
    freedom = max(_independent(residuals) - 2, 1.0)
    error = math.sqrt(sum(residual**2 for residual in residuals) / freedom / spread)
    half = _student(freedom) * error
    slopes = (round(end * SECONDS_PER_HOUR, 3) for end in (slope, slope - half, slope + half))
    third = len(mib) // 3
    level = median(mib[third : 2 * third])
    return Growth(*slopes, level=round(level, 3), step=round(median(mib[2 * third :]) - level, 3))


def _independent(residuals: list[float]) -> float:
    squares = sum(residual**2 for residual in residuals)
    if not squares:
        return len(residuals)
    products = sum(one * other for one, other in itertools.pairwise(residuals))
    correlation = min(max(products / squares, 0.0), 0.99)
    return len(residuals) * (1 - correlation) / (1 + correlation)


def _student(freedom: float) -> float:
    """The two-sided quantile of Student's t, from its expansion around the normal one (Abramowitz, Stegun, 26.7.5)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
