# SPDX-License-Identifier: Apache-2.0
"""benchmarks.steps times what our classes add to vLLM's, and nothing of vLLM's own. Toy classes stand for both."""

from types import SimpleNamespace

import pytest

from benchmarks import steps

OURS, VLLMS = 2.0, 20.0  # microseconds


class Clock:
    """Goes on only where work is pretended."""

    def __init__(self):
        self.us = 0.0

    def __call__(self):
        return 1e-6 * self.us

    def work(self, us):
        self.us += us


clock = Clock()


class StockBuilder:
    def build(self, common_prefix_len, common, fast_build=False):
        clock.work(VLLMS)
        return ["metadata"]


class Builder(StockBuilder):
    def build(self, common_prefix_len, common, fast_build=False):
        metadata = StockBuilder.build(self, common_prefix_len, common, fast_build)
        clock.work(OURS)
        return metadata


class StockImpl:
    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, block_scale=None):
        clock.work(VLLMS)
        return output


class Impl(StockImpl):
    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, block_scale=None):
        if attn_metadata == "sparse":
            return output
        clock.work(OURS)
        return StockImpl.forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale)


@pytest.fixture
def taken(monkeypatch):
    for kind, method in ((StockBuilder, "build"), (Builder, "build"), (StockImpl, "forward"), (Impl, "forward")):
        monkeypatch.setattr(kind, method, vars(kind)[method])  # what it was comes back
    monkeypatch.setattr(steps, "clock", clock)
    taken = []
    steps._time_builds(Builder, taken)
    steps._time_layers(Impl, taken)
    return taken


def run_step(metadata, rows):
    assert Builder().build(0, SimpleNamespace(max_query_len=rows), fast_build=False) == ["metadata"]
    for _ in range(3):
        assert Impl().forward(None, 1, 2, 3, 4, metadata, output="out") == "out"


def test_only_our_share_of_a_step_is_counted(taken):
    run_step("dense", rows=5)
    run_step("dense", rows=1)
    prefill, decode = taken
    assert (prefill.is_prefill, prefill.num_layers, decode.is_prefill, decode.num_layers) == (True, 3, False, 3)
    for step in taken:
        assert step.plan_us == pytest.approx(OURS)
        assert step.layers_us == pytest.approx(3 * OURS)


def test_layers_that_go_sparse_add_nothing_on_their_way_to_dense_attention(taken):
    run_step("sparse", rows=5)
    StockImpl().forward(None, 1, 2, 3, 4, "dense", "out")  # another's layer
    [step] = taken
    assert (step.layers_us, step.num_layers) == (0.0, 0)
    assert steps.summary(taken)["prefill_layers_us"] is None
