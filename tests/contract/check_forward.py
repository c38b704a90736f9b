# SPDX-License-Identifier: Apache-2.0
"""What our layers leave to others: dense steps to FlashAttention, and `forward` to the subclasses that vLLM derives
from ours. Run by test_vllm_033.py, with that release on the path.
"""

import statistics
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.attention.cross_attention import create_cross_attention_backend
from vllm.model_executor.models.whisper_causal import create_whisper_attention_backend_with_block_pooling
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from minference_vllm import impl as impl_module
from minference_vllm.backend import MInferenceBackend
from minference_vllm.reason import Reason
from minference_vllm.runtime import Runtime
from tests.contract.check_layer import attend, make_step
from tests.contract.fakes import (
    DECODE,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LONG,
    MIXED,
    NAME,
    SHORT,
    counted,
    make_builder,
    make_common,
    make_config,
    make_impl,
    make_runtime,
    one_group,
)

pytestmark = pytest.mark.usefixtures("no_gpu")


# Subclasses


def layer_derived_by_vllm(backend: type, runtime: Runtime, **changes: Any) -> Any:
    """An implementation that vLLM derives from ours and that overrides `forward`."""
    config = make_config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(impl_module, "runtime_of", lambda *_: runtime)
        patch.setattr(impl_module, "get_current_vllm_config", lambda: config)
        plain = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
        return backend.get_impl_cls()(
            num_heads=HEADS, head_size=HEAD_DIM, scale=1.0, num_kv_heads=KV_HEADS, **{**plain, **changes}
        )


@pytest.mark.parametrize(
    ("backend", "changes", "reason"),
    [
        (
            create_cross_attention_backend(MInferenceBackend),
            {"attn_type": AttentionType.ENCODER_DECODER},
            Reason.NOT_DECODER,
        ),
        (
            create_whisper_attention_backend_with_block_pooling(MInferenceBackend, 4, 64),
            {"sliding_window": 64},
            Reason.SLIDING_WINDOW,
        ),
    ],
    ids=["cross attention", "block pooling"],
)
def test_a_forward_that_vllm_overrides_in_a_subclass_runs_in_every_step(
    backend: type, changes: dict[str, Any], reason: Reason, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Such layers write their keys in `forward`. An attribute of the instance that hid it would leave them unwritten.
    runtime = make_runtime()
    impl = layer_derived_by_vllm(backend, runtime, **changes)
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
    assert impl.dense_reason is reason


# Cost


def test_layers_without_a_plan_add_little_to_a_dense_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # 32 layers may cost 8 us a step: 0.25 us each. The measure is an empty call with as many arguments, since machines
    # differ in speed.
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
        assert runtime.counters.snapshot().causal_pairs == runtime.account.causal_pairs > 0
