# SPDX-License-Identifier: Apache-2.0
"""Measured recalls on the host, with copies that arrive late."""

import torch

from minference_vllm.metrics.recall_meter import PENDING, RecallMeter
from minference_vllm.recall import LayerRecall, Recall
from minference_vllm.scratch import RecallTotals

CPU = torch.device("cpu")


def make_totals() -> RecallTotals:
    """Three layers of two heads; one chunk was measured in the second."""
    totals = RecallTotals.allocate(3, 2, CPU)
    totals.histogram[[2, 9]] += 1
    totals.chunks[1] += 1
    totals.redone[1] += 1
    totals.sums[1] = totals.worst[1] = torch.tensor([0.55, 1.0], dtype=torch.float64)
    return totals


def test_the_views_are_of_one_tensor_and_do_not_overlap() -> None:
    totals = RecallTotals.allocate(3, 2, CPU)
    for number, view in enumerate((totals.histogram, totals.chunks, totals.redone, totals.sums, totals.worst)):
        view.fill_(number)
    assert totals.flat.tolist() == [0.0] * 10 + [1.0, 2.0, 3.0, 3.0, 4.0, 4.0] * 3
    assert totals.layers.tolist() == [[1.0, 2.0, 3.0, 3.0, 4.0, 4.0]] * 3 and totals.layers.is_contiguous()


def test_a_copy_on_the_host_is_there_at_once_and_layers_without_a_chunk_are_left_out() -> None:
    totals = make_totals()
    meter = RecallMeter(totals)
    assert meter.read() == Recall()
    meter.copy()
    totals.histogram[0] += 100  # after the copy
    recall = meter.read()
    assert recall.histogram == (0, 0, 1, 0, 0, 0, 0, 0, 0, 1)
    assert (recall.redone, recall.measured) == (1, 2)
    assert recall.layers == {1: LayerRecall(1, (0.55, 1.0), (0.55, 1.0))}
    assert list(recall.heads()) == [("1", "0", 0.55, 0.55), ("1", "1", 1.0, 1.0)]
    assert meter.read() == recall, "what was read once is still known"


def test_copies_come_to_the_host_whatever_the_default_device() -> None:
    # Where vLLM's own tests make layers and builders, and so benchmarks.one_layer, the default is the GPU.
    totals = make_totals()
    with torch.device("meta"):
        meter = RecallMeter(totals)
    meter.copy()
    assert meter.read().layers == {1: LayerRecall(1, (0.55, 1.0), (0.55, 1.0))}


def test_a_copy_that_has_not_arrived_is_not_read() -> None:
    totals = make_totals()
    meter = RecallMeter(totals)
    meter.copy()
    first = meter.read()
    totals.histogram[0] += 5
    meter.copy()
    late = meter._copies[-1]
    stamp = float(late[-1])
    late[-1] = PENDING  # as it is until the GPU has come so far
    assert meter.read() == first
    late[-1] = stamp
    assert meter.read().histogram[0] == 5, "a copy that was late is not forgotten"


def test_more_copies_than_slots_leave_the_newest() -> None:
    totals = make_totals()
    meter = RecallMeter(totals)
    for _ in range(40):
        totals.histogram[0] += 1
        meter.copy()
    assert meter.read().histogram[0] == 40
