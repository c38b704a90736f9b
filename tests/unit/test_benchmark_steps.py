# SPDX-License-Identifier: Apache-2.0
"""benchmarks.steps finds what our builder adds to vLLM's. Toys stand for both, and only they move the clock."""

from types import SimpleNamespace

import pytest

from benchmarks import steps

OURS, VLLMS, GATE, CHUNK = 2.0, 20.0, 100, 50


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


class StockImpl:
    def forward(self):
        """Of vLLM's."""


class Impl(StockImpl):
    def forward(self):
        """Of ours."""

    forward.__module__ = "minference_vllm.toy"


class Builder(StockBuilder):
    _min_seq_len, _min_chunk = GATE, CHUNK

    def __init__(self):
        self._layers = SimpleNamespace(layers=[Impl(), Impl(), StockImpl()])

    def build(self, common_prefix_len, common, fast_build=False):
        metadata = StockBuilder.build(self, common_prefix_len, common, fast_build)
        clock.work(OURS)
        if common.max_query_len >= CHUNK and common.max_seq_len >= GATE:
            metadata.minference = "plan"
        return metadata


@pytest.fixture
def taken(monkeypatch):
    monkeypatch.setattr(Builder, "build", Builder.build)  # what it was comes back
    monkeypatch.setattr(steps, "clock", clock)
    return steps.time_steps(Builder, seed=0)


def run(builder, rows, keys):
    return builder.build(0, SimpleNamespace(max_query_len=rows, max_seq_len=keys), fast_build=False)


def test_what_ours_adds_is_found_for_each_kind_of_step(taken):
    builder = Builder()
    for _ in range(40):
        for rows, keys in ((7, 9), (1, 9), (60, GATE), (1, GATE), (7, GATE)):
            run(builder, rows, keys)
    rows = steps.make_rows(taken, max_num_seqs=8)
    assert sum(row["steps"] for row in rows) == len(taken) == 160
    assert {(row["step"], row["beside"]) for row in rows} >= {
        ("prefill", steps.SHORT), ("prefill", steps.LONG), ("decode", steps.SHORT), ("decode", steps.AFTER)
    }  # fmt: skip
    for row in rows:
        assert row["added_us"] == pytest.approx(OURS)
        assert (row["stock_us"], row["error_us"], row["looking_layers"]) == (pytest.approx(VLLMS + 1), 0.0, 2)


def test_steps_that_may_go_sparse_are_built_by_ours_and_not_timed(taken):
    assert all(hasattr(run(Builder(), CHUNK, GATE), "minference") for _ in range(20))
    assert taken == []


def test_the_first_dense_step_after_a_sparse_one_is_told_apart_whoever_builds_it(taken):
    builder = Builder()
    for _ in range(20):
        run(builder, CHUNK, GATE)
        run(builder, 1, 9)
        run(builder, 1, 9)
    assert [step.beside for step in taken] == [steps.AFTER, steps.SHORT] * 20
    assert {step.ours for step in taken if step.beside == steps.AFTER} == {True, False}


def test_a_kind_of_step_without_both_builders_makes_no_row():
    assert steps.make_rows([steps.TimedStep("decode", steps.SHORT, True, 1.0, 0)] * 5, 8) == []


def test_the_error_is_the_spread_of_the_medians():
    assert steps._error([1.0] * 9, [3.0] * 9) == 0.0
    assert 0.1 < steps._error(list(range(100)), [3.0] * 9) < 20
