# SPDX-License-Identifier: Apache-2.0
"""The density meter on the host, with copies that arrive late, and on a real GPU."""

import pytest
import torch

from minference_vllm.metrics.density import SLOTS, DensityMeter


@pytest.fixture
def kept_pairs():
    return torch.zeros(1, dtype=torch.int64)


class LatePairs:
    """Stands in for a counter on a GPU: a copy of it arrives when the test says so."""

    is_cuda = False

    def __init__(self):
        self.value = 0
        self.in_flight = []

    def arrive(self):
        """The oldest copy in flight does."""
        slot, value = self.in_flight.pop(0)
        slot.fill_(value)


@pytest.fixture
def late(monkeypatch):
    pairs, copy = LatePairs(), torch.Tensor.copy_

    def copy_later(slot, source, non_blocking=False):
        assert non_blocking
        if source is not pairs:
            return copy(slot, source)
        pairs.in_flight.append((slot, pairs.value))
        return slot

    monkeypatch.setattr(torch.Tensor, "copy_", copy_later)
    return pairs


def test_on_the_host_a_copy_is_there_at_once(kept_pairs):
    meter = DensityMeter(kept_pairs)
    assert meter.read() == (0, 0)
    kept_pairs += 30
    meter.copy(100)
    assert [meter.read(), meter.read()] == [(30, 100)] * 2


def test_what_was_kept_after_the_copy_is_not_in_it(kept_pairs):
    meter = DensityMeter(kept_pairs)
    kept_pairs += 30
    meter.copy(100)
    kept_pairs += 50
    assert meter.read() == (30, 100)
    meter.copy(400)
    assert meter.read() == (80, 400)


def test_each_copy_has_the_causal_pairs_of_its_own_time(late):
    meter = DensityMeter(late)
    for late.value, causal_pairs in ((30, 100), (80, 400), (90, 500)):
        meter.copy(causal_pairs)
    readings = [meter.read()]
    while late.in_flight:
        late.arrive()
        readings.append(meter.read())
    assert readings == [(0, 0), (30, 100), (80, 400), (90, 500)]


def test_more_steps_than_slots_are_read_as_they_arrive(late):
    meter = DensityMeter(late)
    for step in range(1, 5 * SLOTS):
        late.value = 3 * step
        meter.copy(10 * step)
        if step > 2:
            late.arrive()
            assert meter.read() == (3 * (step - 2), 10 * (step - 2))


def test_a_reader_may_come_after_the_slots_were_used_again(late):
    meter = DensityMeter(late)
    for step in range(1, 5 * SLOTS):
        late.value = 3 * step
        meter.copy(10 * step)
        late.arrive()
    assert meter.read() == (late.value, 10 * step)


def test_totals_go_on_past_64_bits(kept_pairs):
    meter = DensityMeter(kept_pairs)
    step = 2**62
    for steps in range(1, 12):
        kept_pairs += step
        meter.copy(4 * steps * step)
        assert meter.read() == (steps * step, 4 * steps * step)


@pytest.mark.gpu
def test_on_the_gpu_neither_a_copy_nor_a_read_waits():
    kept_pairs = torch.zeros(1, dtype=torch.int64, device="cuda")
    thirty = torch.full_like(kept_pairs, 30)
    meter = DensityMeter(kept_pairs)
    kept_pairs.add_(thirty).zero_()  # loads the kernels, for which CUDA may wait
    meter.copy(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(500_000_000)  # clock cycles: a quarter of a second and more
        for causal_pairs in (100, 200):
            kept_pairs += thirty
            meter.copy(causal_pairs)
            assert meter.read() == (0, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert meter.read() == (60, 200)
