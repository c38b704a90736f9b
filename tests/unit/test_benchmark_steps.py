# SPDX-License-Identifier: Apache-2.0
"""benchmarks.steps finds what our builder and layers add to vLLM's. Toys stand for both; only they move the clock."""

from types import SimpleNamespace

import pytest

from benchmarks import steps

OURS, VLLMS, GATE, CHUNK = 2.0, 20.0, 100, 50
LAYERS, OUR_LAYER, VLLMS_LAYER = 4, 0.25, 30.0


class Clock:
    def __init__(self):
        self.us = 0.0

    def __call__(self):
        return 1e-6 * self.us

    def work(self, us):
        self.us += us


clock = Clock()


class StockBuilder:
    def build(self, common_prefix_len, common, fast_build=False):
        clock.work(VLLMS + common.max_query_len % 2)
        return SimpleNamespace()


class Builder(StockBuilder):
    _min_seq_len, _min_chunk = GATE, CHUNK

    def build(self, common_prefix_len, common, fast_build=False):
        metadata = super().build(common_prefix_len, common, fast_build)
        clock.work(OURS)
        if common.max_query_len >= CHUNK and common.max_seq_len >= GATE:
            metadata.minference = "plan"
        return metadata


class StockLayer:
    def forward(self, metadata, output=None):
        clock.work(VLLMS_LAYER)
        return output


class Layer(StockLayer):
    def forward(self, metadata, output=None):
        clock.work(OUR_LAYER)
        return super().forward(metadata, output)


@pytest.fixture
def timer(monkeypatch):
    monkeypatch.setattr(Builder, "build", Builder.build)  # what they were comes back
    monkeypatch.setattr(Layer, "forward", Layer.forward)
    monkeypatch.setattr(steps, "clock", clock)
    timer = steps.StepTimer(seed=0)
    timer.watch_builder(Builder)
    timer.watch_layers(Layer)
    return timer


def run(rows, keys):
    """A step: its metadata is built, then each layer runs."""
    metadata = Builder().build(0, SimpleNamespace(max_query_len=rows, max_seq_len=keys), fast_build=False)
    assert [Layer().forward(metadata, output=at) for at in range(LAYERS)] == list(range(LAYERS))
    return metadata


def test_what_ours_adds_is_found_for_each_kind_of_step(timer):
    for _ in range(40):
        for rows, keys in ((7, 9), (1, 9), (60, GATE), (1, GATE), (7, GATE)):
            run(rows, keys)
    rows = steps.make_rows(timer.steps, max_num_seqs=8)
    assert sum(row["steps"] for row in rows) == len(timer.steps) == 160
    assert {(row["step"], row["beside"]) for row in rows} >= {
        ("prefill", steps.SHORT), ("prefill", steps.LONG), ("decode", steps.SHORT), ("decode", steps.AFTER)
    }  # fmt: skip
    for row in rows:
        assert (row["stock_us"], row["error_us"]) == (pytest.approx(VLLMS + 1), 0.0)
        assert row["added_us"] == pytest.approx(OURS)
        assert (row["layers_stock_us"], row["layers_error_us"]) == (pytest.approx(LAYERS * VLLMS_LAYER), 0.0)
        assert row["layers_added_us"] == pytest.approx(LAYERS * OUR_LAYER)


def test_steps_that_may_go_sparse_are_run_by_ours_and_not_timed(timer):
    start = clock()
    assert all(hasattr(run(CHUNK, GATE), "minference") for _ in range(20))
    layers = LAYERS * (OUR_LAYER + VLLMS_LAYER)
    assert clock() - start == pytest.approx(20e-6 * (OURS + VLLMS + layers))
    assert timer.steps == []


def test_the_layers_of_a_step_are_those_of_whoever_built_it(timer):
    for _ in range(20):
        run(7, 9)
    assert {(step.ours, round(step.layers_us, 6)) for step in timer.steps} == {
        (True, LAYERS * (OUR_LAYER + VLLMS_LAYER)), (False, LAYERS * VLLMS_LAYER)
    }  # fmt: skip


def test_the_first_dense_step_after_a_sparse_one_is_told_apart_whoever_builds_it(timer):
    for _ in range(20):
        run(CHUNK, GATE)
        run(1, 9)
        run(1, 9)
    assert [step.beside for step in timer.steps] == [steps.AFTER, steps.SHORT] * 20
    assert {step.ours for step in timer.steps if step.beside == steps.AFTER} == {True, False}


def test_a_kind_of_step_that_only_one_of_them_ran_makes_no_row():
    assert steps.make_rows([steps.TimedStep("decode", steps.SHORT, True, 1.0)] * 5, 8) == []


def test_the_error_is_the_spread_of_the_medians():
    assert steps.compare("", [1.0] * 9, [3.0] * 9)["error_us"] == 0.0
    assert 0.1 < steps.compare("", list(range(100)), [3.0] * 9)["error_us"] < 20


def test_the_method_that_ours_overrides_is_the_nearest():
    class Derived(Layer):
        forward = None

    assert steps.inherited(Derived, "forward") is Layer.forward
    assert steps.inherited(Layer, "forward") is StockLayer.forward
