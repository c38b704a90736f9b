# SPDX-License-Identifier: Apache-2.0
"""The density meter on the host, with an event that arrives late, and on a real GPU."""

import pytest
import torch

from minference_vllm.metrics import density
from minference_vllm.metrics.density import DensityMeter


class LateEvent:
    """A copy that arrives when the test says so."""

    def __init__(self):
        self.records = 0
        self.arrived = False

    def record(self):
        self.records += 1
        self.arrived = False

    def query(self):
        return self.arrived


@pytest.fixture
def kept_pairs():
    return torch.zeros(1, dtype=torch.int64)


@pytest.fixture
def event(monkeypatch):
    event = LateEvent()
    monkeypatch.setattr(density, "_HostEvent", lambda: event)
    return event


def test_on_the_host_a_poll_reads_directly(kept_pairs):
    meter = DensityMeter(kept_pairs)
    kept_pairs += 30
    assert meter.poll(100, now=0.0) == (30, 100)


def test_between_two_copies_lies_at_least_the_interval(kept_pairs):
    meter = DensityMeter(kept_pairs, interval=2.0)
    assert meter.poll(10, now=10.0) == (0, 10)
    kept_pairs += 30
    assert meter.poll(100, now=11.9) is None
    assert meter.poll(100, now=12.0) == (30, 100)


def test_steps_without_sparse_work_copy_nothing(kept_pairs, event):
    meter = DensityMeter(kept_pairs)
    assert meter.poll(0, now=0.0) is None
    assert event.records == 0
    assert meter.poll(100, now=1.0) is None
    event.arrived = True
    assert meter.poll(100, now=2.0) == (0, 100)
    assert meter.poll(100, now=9.0) is None
    assert event.records == 1


def test_nothing_is_returned_before_the_copy_arrives(kept_pairs, event):
    meter = DensityMeter(kept_pairs)
    assert meter.poll(100, now=0.0) is None
    assert meter.poll(200, now=5.0) is None
    assert event.records == 1


def test_a_late_copy_keeps_the_causal_pairs_of_its_own_time(kept_pairs, event):
    meter = DensityMeter(kept_pairs)
    kept_pairs += 30
    assert meter.poll(100, now=0.0) is None
    kept_pairs += 50
    event.arrived = True
    assert meter.poll(400, now=0.5) == (30, 100)
    assert meter.poll(400, now=1.0) is None
    event.arrived = True
    assert meter.poll(900, now=1.1) == (80, 400)


def test_totals_go_on_past_64_bits(kept_pairs):
    meter = DensityMeter(kept_pairs)
    step = 2**62
    for steps in range(1, 12):
        kept_pairs += step
        assert meter.poll(4 * steps * step, now=float(steps)) == (steps * step, 4 * steps * step)


@pytest.mark.gpu
def test_on_the_gpu_a_poll_never_waits():
    kept_pairs = torch.zeros(1, dtype=torch.int64, device="cuda")
    thirty = torch.full_like(kept_pairs, 30)
    meter = DensityMeter(kept_pairs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(500_000_000)  # clock cycles: a quarter of a second and more
        kept_pairs += thirty
        assert meter.poll(100, now=0.0) is None
        kept_pairs += thirty
        assert meter.poll(200, now=0.1) is None
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert meter.poll(300, now=0.2) == (30, 100)
