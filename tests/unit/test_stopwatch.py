# SPDX-License-Identifier: Apache-2.0
"""The stopwatch: on the host, with a GPU that tells late, and on a real one."""

import time
from collections import Counter

import pytest
import torch

from minference_vllm.metrics import stopwatch
from minference_vllm.metrics.snapshot import Times
from minference_vllm.metrics.stopwatch import PERIOD, SLOTS, Stopwatch

CPU = torch.device("cpu")


class LateEvent:
    """Stands in for a CUDA event: the GPU comes to it when the test says so, and it must not be waited for."""

    now = 0.0
    has_come = False

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        LateEvent.now += 5
        self.at = LateEvent.now

    def query(self) -> bool:
        return LateEvent.has_come

    def elapsed_time(self, later: "LateEvent") -> float:
        assert self.has_come, "a time was asked for that is not known"
        return later.at - self.at


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> type[LateEvent]:
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    monkeypatch.setattr(stopwatch, "PERIOD", 1)
    monkeypatch.setattr(LateEvent, "has_come", False)
    return LateEvent


def run(watch: Stopwatch) -> bool:
    """One layer's attention of a chunk; whether it was timed."""
    lap = watch.begin()
    if lap:
        lap.timing(lambda: None)()
        watch.end(lap)
    return lap is not None


def test_on_the_host_the_stages_are_timed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "PERIOD", 1)
    times = iter((10.0, 10.25, 11.0))
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(times))
    watch = Stopwatch(CPU)
    lap = watch.begin()
    assert lap.timing(lambda word: word)("chosen") == "chosen"
    watch.end(lap)
    watch.collect()
    assert watch.total == Times(1, 0.25, 0.75)


def test_every_layer_is_timed_as_often() -> None:
    watch = Stopwatch(CPU)
    timed: Counter[int] = Counter()
    for _ in range(PERIOD):  # steps
        for layer in range(32):
            timed[layer] += run(watch)
        watch.collect()
    assert timed == dict.fromkeys(range(32), 1)


def test_a_time_counts_once_the_gpu_has_told_it(late: type[LateEvent]) -> None:
    watch = Stopwatch(torch.device("cuda"))
    assert run(watch)
    watch.collect()
    assert watch.total == Times()
    late.has_come = True
    for _ in range(2):
        watch.collect()
        assert watch.total == Times(1, 0.005, 0.005)


def test_a_gpu_that_is_far_behind_has_less_timed(late: type[LateEvent]) -> None:
    watch = Stopwatch(torch.device("cuda"))
    assert [run(watch) for _ in range(SLOTS + 2)] == [True] * SLOTS + [False] * 2
    late.has_come = True
    watch.collect()
    assert watch.total.laps == SLOTS
    assert run(watch)


def test_a_run_that_fails_is_not_timed_and_takes_no_slot(late: type[LateEvent]) -> None:
    watch = Stopwatch(torch.device("cuda"))
    late.has_come = True
    for _ in range(2 * SLOTS):
        watch.begin().timing(lambda: None)()  # and never ends
    watch.collect()
    assert watch.total == Times()
    assert run(watch)
    watch.collect()
    assert watch.total == Times(1, 0.005, 0.005)


def test_a_run_that_is_not_timed_costs_next_to_nothing() -> None:
    watch = Stopwatch(CPU)
    watch._runs, runs = 0, PERIOD - 1
    best = min(_seconds(watch, runs) for _ in range(50)) / runs
    assert best < 2e-6  # some 0.1 µs; a step has a few dozen layers


def _seconds(watch: Stopwatch, runs: int) -> float:
    watch._runs = 0
    start = time.perf_counter()
    for _ in range(runs):
        watch.begin()
    return time.perf_counter() - start


@pytest.mark.gpu
def test_on_a_gpu_the_times_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "PERIOD", 1)
    watch = Stopwatch(torch.device("cuda"))
    cycles = 20_000_000  # some 10 ms
    torch.cuda.synchronize()
    lap = watch.begin()
    lap.timing(torch.cuda._sleep)(2 * cycles)
    torch.cuda._sleep(cycles)
    watch.end(lap)
    watch.collect()
    assert watch.total == Times(), "the GPU was waited for"
    torch.cuda.synchronize()
    watch.collect()
    assert watch.total.laps == 1
    assert watch.total.choose == pytest.approx(2 * watch.total.attend, rel=0.1)
