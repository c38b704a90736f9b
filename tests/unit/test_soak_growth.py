# SPDX-License-Identifier: Apache-2.0
"""What benchmarks.soak says of memory that grows, and of memory that only looks like it."""

import math
import random

import pytest

from benchmarks.soak.growth import Growth, growth


def test_memory_that_grows_by_a_line_grows_by_its_slope() -> None:
    times = [2.0 * at for at in range(100)]
    # The first half, warm-up, does not count.
    found = growth(times, [5000.0 if at < 100 else 1000 + at / 36 for at in times])
    assert found is not None
    assert (found.per_hour, found.low, found.high) == (pytest.approx(100.0, abs=0.01),) * 3


def test_the_interval_of_noise_holds_no_growth_19_times_of_20() -> None:
    rng = random.Random(0)
    times = [2.0 * at for at in range(80)]
    found = [growth(times, [1000 + rng.gauss(0, 10) for _ in times]) for _ in range(400)]
    assert sum(one is not None and one.low < 0 < one.high for one in found) == pytest.approx(380, abs=12)


def test_waves_widen_the_interval() -> None:
    times = [2.0 * at for at in range(400)]
    wave = [10 * math.sin(at / 40) for at in times]
    shuffled = random.Random(0).sample(wave, len(wave))
    slow, quick = growth(times, wave), growth(times, shuffled)
    assert slow is not None and quick is not None
    assert slow.high - slow.low > 3 * (quick.high - quick.low)


def test_few_samples_tell_no_slope() -> None:
    assert growth([1.0 * at for at in range(30)], [0.0] * 30) is None
    assert growth([1.0 * at for at in range(32)], [7.0] * 32) == Growth(0, 0, 0, level=7.0, step=0.0)


def test_a_step_is_told_from_waves_and_spikes() -> None:
    rng = random.Random(0)
    times = [2.0 * at for at in range(120)]
    # Garbage that comes and goes, and now and then a large answer.
    noise = [6000 + 20 * math.sin(at / 7) + rng.gauss(0, 5) + 300 * (rng.random() < 0.05) for at in times]
    quiet = growth(times, noise)
    assert quiet is not None and abs(quiet.step) < 16 and quiet.level == pytest.approx(6000, abs=20)
    leak = growth(times, [mib + at for at, mib in zip(times, noise, strict=True)])  # 1 MiB a second, an hour's 3.6 GiB
    assert leak is not None and leak.step == pytest.approx(80, abs=16)
    # Memory that only warms up has no step.
    warm = growth(times, [mib - 500 * math.exp(-at / 15) for at, mib in zip(times, noise, strict=True)])
    assert warm is not None and abs(warm.step) < 16
