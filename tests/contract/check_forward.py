# SPDX-License-Identifier: Apache-2.0
"""What our layers leave to others: to FlashAttention in dense steps, to vLLM's subclasses of ours, to a dense run after
an exception. Run by test_vllm_033.py, with that release on the path.
"""

import statistics
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.attention.cross_attention import create_cross_attention_backend
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from minference_vllm import impl as impl_module
from minference_vllm import runtime as runtime_module
from minference_vllm.backend import MInferenceBackend
from minference_vllm.plan import ALL_DENSE
from minference_vllm.reason import Reason
from minference_vllm.runtime import MOST_FAULTS, Runtime
from tests.contract.check_layer import attend, flash_attention, make_step
from tests.contract.fakes import (
    DECODE,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LONG,
    MIXED,
    NAME,
    PAGE,
    SHORT,
    counted,
    make_builder,
    make_common,
    make_config,
    make_impl,
    make_runtime,
    one_group,
)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlashAttentionImpl, "forward", flash_attention)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the runtime logs: level, message, and whether a traceback comes with it."""
    lines: list[str] = []
    for level in ("exception", "error", "warning"):
        monkeypatch.setattr(
            runtime_module.logger, level, lambda text, *of, level=level: lines.append(f"{level}: {text % of}")
        )
    yield lines


# Subclasses


def cross_attention_layer(runtime: Runtime) -> Any:
    """An implementation that vLLM derives from ours and that overrides `forward`."""
    kind = create_cross_attention_backend(MInferenceBackend).get_impl_cls()
    config = make_config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(impl_module, "runtime_of", lambda *_: runtime)
        patch.setattr(impl_module, "get_current_vllm_config", lambda: config)
        return kind(
            num_heads=HEADS, head_size=HEAD_DIM, scale=1.0, num_kv_heads=KV_HEADS, alibi_slopes=None,
            sliding_window=None, kv_cache_dtype="auto", attn_type=AttentionType.ENCODER_DECODER,
        )  # fmt: skip


def test_a_forward_that_vllm_overrides_in_a_subclass_runs_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # Cross attention writes its keys there: hidden by an attribute of the instance, they were never written.
    runtime = make_runtime()
    impl = cross_attention_layer(runtime)
    builder = make_builder({NAME.format(0): impl})
    written: list[int] = []
    monkeypatch.setattr(type(impl), "do_kv_cache_update", lambda self, layer, key, *_: written.append(len(key)))
    assert type(impl).forward is not impl_module.MInferenceImpl.forward
    key = torch.zeros(7, KV_HEADS, HEAD_DIM)
    layer: Any = SimpleNamespace(kv_sharing_target_layer_name=None)
    for batch in ((SHORT,), (DECODE,), (LONG,), (DECODE,)):
        assert "forward" not in vars(impl)
        common = make_common(*batch)
        query, cache = make_step(common)
        impl.forward(layer, query, key, key, cache, builder.build(0, common), torch.empty_like(query))
    assert written == [7] * 4
    assert impl.dense_reason is Reason.NOT_DECODER


# Cost


def test_layers_without_a_plan_add_little_to_a_dense_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # 32 layers may cost 8 us a step: 0.25 us each. An empty call of as many arguments is the yardstick, since the clock
    # of this machine is not that of another.
    monkeypatch.setattr(FlashAttentionImpl, "forward", lambda self, *_: None)
    _, builder, (impl, _) = one_group()
    metadata = builder.build(0, make_common(SHORT))
    arguments = (None, None, None, None, None, metadata, None)
    stock = FlashAttentionImpl.forward

    def seconds(call: Any) -> float:
        start = time.perf_counter()
        for _ in range(1000):
            call()
        return time.perf_counter() - start

    ratios = []
    for _ in range(50):
        bare = seconds(lambda: stock(impl, *arguments))
        ratios.append(seconds(lambda: impl.forward(*arguments)) / bare)
    assert statistics.median(ratios) < 3.5


# The last sparse layer


def test_the_last_sparse_layer_has_the_step_counted_and_the_density_copied() -> None:
    runtime = make_runtime()
    layers = {NAME.format(i): make_impl(runtime, sliding_window=64 if i == 3 else None) for i in range(4)}
    builder, impls = make_builder(layers), list(layers.values())
    assert [impl.is_last_sparse for impl in impls] == [False, False, True, False]
    for steps in (1, 2):
        common = make_common(*MIXED)
        query, cache = make_step(common)
        metadata = builder.build(0, common)
        for impl in impls[:2]:
            attend(impl, query, cache, metadata)
        assert counted(runtime).get(("sparse", "gate_open"), 0) == (steps - 1) * 2 * LONG.rows
        for impl in impls[2:]:
            attend(impl, query, cache, metadata)
        assert counted(runtime)["sparse", "gate_open"] == steps * 2 * LONG.rows
        assert runtime.counters.snapshot().causal_pairs == runtime._causal_pairs > 0


# Faults of the sparse path


def fail(*_: Any) -> Any:
    raise RuntimeError("a wrapper that raises")


def test_a_chunk_whose_sparse_attention_raises_runs_dense(log: list[str]) -> None:
    runtime, builder, impls = one_group()
    common = make_common(*MIXED)
    query, cache = make_step(common)
    metadata = builder.build(0, common)
    expected = [attend(impl, query, cache, metadata)[: common.num_actual_tokens] for impl in impls]
    before = counted(runtime)
    works, chooser = [False, True, True, True], runtime.chooser

    def fail_once(*arguments: Any) -> Any:
        return chooser(*arguments) if works.pop(0) else fail()

    runtime.chooser = fail_once
    metadata = builder.build(0, common)
    for impl, dense in zip(impls, expected, strict=True):
        output = attend(impl, query, cache, metadata)
        # Every key is kept here: sparse and dense agree but for rounding.
        torch.testing.assert_close(output[: common.num_actual_tokens], dense, rtol=1.6e-2, atol=1e-2)
        assert (output[common.num_actual_tokens :] == 7.0).all()
    after = counted(runtime)
    assert after["dense", "sparse_fault"] == LONG.rows
    assert after["sparse", "gate_open"] - before["sparse", "gate_open"] == LONG.rows
    assert log == ["exception: MInference: sparse attention failed in layer 0; its rows run dense."]
    assert not runtime.is_broken


def test_after_three_faults_in_a_row_all_runs_dense(log: list[str]) -> None:
    runtime, builder, impls = one_group(layers=3)
    common = make_common(LONG)
    query, cache = make_step(common)
    works = runtime.chooser
    runtime.chooser = fail
    attend(impls[0], query, cache, builder.build(0, common))
    runtime.chooser = works
    attend(impls[1], query, cache, builder.build(0, common))  # the row is broken
    runtime.chooser = fail
    metadata = builder.build(0, common)
    for number, impl in enumerate(impls, start=1):
        assert attend(impl, query, cache, metadata).isfinite().all()
        assert runtime.is_broken == (number >= MOST_FAULTS)
    runtime.chooser = works
    assert builder.plan_step(common, metadata) == (ALL_DENSE, None)
    assert counted(runtime) == {("dense", "sparse_fault"): 2 * LONG.rows}
    assert [line.split(":")[0] for line in log] == ["exception", "error"]
    assert "until the server is started again" in log[-1]


def test_debug_raises_what_service_would_run_dense() -> None:
    runtime = make_runtime(debug=True)
    impl = make_impl(runtime)
    builder = make_builder({NAME.format(0): impl})
    common = make_common(LONG)
    attend(impl, *make_step(common), builder.build(0, common))
    runtime.chooser = fail
    with pytest.raises(RuntimeError, match="a wrapper that raises"):
        attend(impl, *make_step(common), builder.build(0, common))


def test_debug_finds_an_index_that_lists_no_key_and_an_output_that_is_no_number() -> None:
    runtime = make_runtime(debug=True)
    impl = make_impl(runtime)
    builder = make_builder({NAME.format(0): impl})
    common, works = make_common(LONG), runtime.chooser
    query, cache = make_step(common)

    def break_index(*arguments: Any) -> Any:
        index = works(*arguments)
        index.columns[1, 5] = 3
        return index

    runtime.chooser = break_index
    with pytest.raises(RuntimeError, match=r"layer 0.*head 1: columns are no ascending keys below 200"):
        attend(impl, query, cache, builder.build(0, common))
    runtime.chooser = works
    with pytest.raises(RuntimeError, match="NaN or infinity"):
        attend(impl, query, cache.fill_(torch.nan), builder.build(0, common))
    assert PAGE == 16
