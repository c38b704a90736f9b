# SPDX-License-Identifier: Apache-2.0
"""Our attention implementation on top of vLLM's. Run by test_vllm_033.py, with that release on the path.

FlashAttention itself needs a GPU: dense attention in torch stands in for its forward.
"""

from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from minference_vllm.chunk import PagedKV
from minference_vllm.reason import Reason
from minference_vllm.reference.dense import dense
from minference_vllm.scratch import num_bytes
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
    Row,
    add_layers,
    counted,
    has_plan,
    make_builder,
    make_common,
    make_config,
    make_impl,
    make_runtime,
    one_group,
)


def flash_attention(
    self: Any, layer: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Any, output: Any, *scales: Any
) -> torch.Tensor:
    """What FlashAttentionImpl.forward computes for a plain layer."""
    if any(scale is not None for scale in scales):
        raise NotImplementedError
    if metadata is None:
        return output.fill_(0)
    k, v = cache.split(self.head_size, dim=-1)
    starts = metadata.query_start_loc.tolist()
    assert starts[-1] == metadata.num_actual_tokens <= len(query)
    for request, seq_len in enumerate(metadata.seq_lens.tolist()):
        rows = slice(starts[request], starts[request + 1])
        kv = PagedKV(k, v, metadata.block_table, request)
        dense(query[rows], kv, seq_len - (rows.stop - rows.start), self.scale, output[rows], sinks=self.sinks)
    return output


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The metadata of each call of FlashAttention."""
    seen: list[Any] = []

    def forward(self: Any, *arguments: Any, **scales: Any) -> torch.Tensor:
        seen.append(arguments[5])
        return flash_attention(self, *arguments, *scales.values())

    monkeypatch.setattr(FlashAttentionImpl, "forward", forward)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return seen


@pytest.fixture
def any_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which FlashAttention takes every kind of layer."""
    monkeypatch.setattr(flash_attn, "flash_attn_supports_kv_cache_dtype", lambda *_, **__: True)
    # vLLM imports this function only where there is a GPU.
    monkeypatch.setattr(flash_attn, "flash_attn_supports_sinks", lambda: True, raising=False)


def make_step(common: Any, head_dim: int = HEAD_DIM) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries, padded as for a CUDA graph, and a cache in the memory order of vLLM's default layout."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(common.num_actual_tokens + 5, HEADS, head_dim, generator=generator).bfloat16()
    pages = common.block_table_tensor.numel()
    cache = torch.randn(pages, PAGE, KV_HEADS, 2 * head_dim, generator=generator).bfloat16().transpose(1, 2)
    return query, cache


def attend(impl: Any, query: torch.Tensor, cache: torch.Tensor, metadata: Any, **scales: Any) -> torch.Tensor:
    output = torch.full_like(query, 7.0)
    assert impl.forward(torch.nn.Module(), query, None, None, cache, metadata, output, **scales) is output
    return output


def assert_dense(impl: Any, reason: Reason, calls: list[Any]) -> None:
    """The layer passes its call on to FlashAttention unchanged, even in a step in which other layers go sparse."""
    _, builder, _ = one_group()
    common = make_common(*MIXED)
    metadata = builder.build(0, common)
    assert has_plan(metadata)
    attend(impl, *make_step(common, impl.head_size), metadata)
    assert calls == [metadata]
    assert impl.dense_reason is reason


@pytest.mark.usefixtures("any_gpu")
@pytest.mark.parametrize(
    ("arguments", "parallel", "reason"),
    [
        pytest.param({"attn_type": AttentionType.ENCODER_ONLY}, {}, Reason.NOT_DECODER, id="encoder"),
        pytest.param({"attn_type": AttentionType.ENCODER_DECODER}, {}, Reason.NOT_DECODER, id="cross attention"),
        pytest.param({"sliding_window": 128}, {}, Reason.SLIDING_WINDOW, id="sliding window"),
        pytest.param({"alibi_slopes": [0.5] * HEADS}, {}, Reason.ALIBI, id="alibi"),
        pytest.param({"logits_soft_cap": 30.0}, {}, Reason.SOFT_CAP, id="soft cap"),
        pytest.param({"kv_cache_dtype": "fp8_e5m2"}, {}, Reason.QUANTIZED_KV, id="fp8_e5m2 cache"),
        pytest.param({"kv_cache_dtype": "fp8_per_token_head"}, {}, Reason.QUANTIZED_KV, id="scales by token and head"),
        pytest.param({"kv_cache_dtype": "int8_per_token_head"}, {}, Reason.QUANTIZED_KV, id="int8 cache"),
        pytest.param({"kv_cache_dtype": "nvfp4"}, {}, Reason.QUANTIZED_KV, id="nvfp4 cache"),
        pytest.param({"head_size": 96}, {}, Reason.HEAD_DIM, id="head_dim 96"),
        pytest.param({"kv_sharing_target_layer_name": NAME.format(0)}, {}, Reason.KV_SHARING, id="shared cache"),
        pytest.param({}, {"dcp": 2}, Reason.CONTEXT_PARALLEL, id="decode context parallel"),
        pytest.param({}, {"pcp": 2}, Reason.CONTEXT_PARALLEL, id="prefill context parallel"),
        pytest.param({}, {"ubatching": True}, Reason.MICRO_BATCHING, id="micro-batches"),
    ],
)
def test_a_layer_runs_dense_for_a_named_reason(
    arguments: dict[str, Any], parallel: dict[str, int], reason: Reason, calls: list[Any]
) -> None:
    runtime, config = make_runtime(), make_config(**parallel)
    impl = make_impl(runtime, config, **arguments)
    builder = make_builder({NAME.format(0): impl}, config)
    assert_dense(impl, reason, calls)
    assert not has_plan(builder.build(0, make_common(LONG)))
    assert counted(runtime) == {("dense", reason.value): LONG.rows}


def test_batch_invariance_keeps_every_layer_dense(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("VLLM_BATCH_INVARIANT", "1")
        impl = make_impl(make_runtime())
        make_builder({NAME.format(0): impl})
    assert_dense(impl, Reason.BATCH_INVARIANT, calls)


@pytest.mark.parametrize("kind", [{}, {"kv_cache_dtype": "bfloat16"}, {"attn_type": "decoder"}, {"head_size": 128}])
def test_a_plain_layer_may_go_sparse(kind: dict[str, Any]) -> None:
    impl = make_impl(make_runtime(), **kind)
    make_builder({NAME.format(0): impl})
    assert impl.is_decided
    assert impl.dense_reason is None


def test_a_step_without_a_plan_is_flash_attentions(calls: list[Any]) -> None:
    _, builder, impls = one_group()
    common = make_common(DECODE, SHORT)
    metadata = builder.build(0, common)
    attend(impls[0], *make_step(common), metadata)
    assert calls == [metadata]


def test_metadata_that_another_builder_made_is_flash_attentions(calls: list[Any]) -> None:
    _, builder, impls = one_group()
    common = make_common(*MIXED)
    metadata = builder.build(0, common)
    del metadata.minference
    attend(impls[0], *make_step(common), metadata)
    assert calls == [metadata]


def test_a_stream_that_is_being_captured_is_flash_attentions(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    _, builder, impls = one_group()
    common = make_common(*MIXED)
    metadata = builder.build(0, common)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    attend(impls[0], *make_step(common), metadata)
    assert calls == [metadata]


@pytest.mark.parametrize("scale", ["output_scale", "output_block_scale"])
@pytest.mark.parametrize("batch", [(LONG,), MIXED, (DECODE,)], ids=["all sparse", "mixed", "decode"])
def test_fused_output_quantisation_is_refused_as_by_flash_attention(
    batch: tuple[Row, ...], scale: str, calls: list[Any]
) -> None:
    _, builder, impls = one_group()
    common = make_common(*batch)
    with pytest.raises(NotImplementedError):
        attend(impls[0], *make_step(common), builder.build(0, common), **{scale: torch.ones(1)})


def test_the_profiling_run_claims_the_scratch_of_all_layers_once(calls: list[Any]) -> None:
    runtime = make_runtime()
    impls = {NAME.format(i): make_impl(runtime) for i in range(2)}
    add_layers(impls, make_config())
    query, cache = make_step(make_common(LONG))
    assert runtime._buffers == {}
    for impl in impls.values():
        assert (attend(impl, query, cache, None) == 0).all()
    [claimed] = runtime._buffers.values()
    assert all(num_bytes(buffers) > 0 for buffers in claimed)


@pytest.mark.parametrize("batch", [MIXED, (LONG,), (LONG, LONG, DECODE), (SHORT, LONG)], ids=len)
def test_a_full_budget_gives_what_flash_attention_gives_for_the_whole_step(
    batch: tuple[Row, ...], calls: list[Any]
) -> None:
    _, builder, impls = one_group()
    assert_as_flash_attention(impls[0], builder, batch, calls)


@pytest.mark.usefixtures("any_gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "float32"])
def test_sinks_go_to_both_parts_of_a_step(dtype: torch.dtype, calls: list[Any]) -> None:
    impl = make_impl(make_runtime(), sinks=torch.tensor([2.0, -30.0, 30.0, 8.0], dtype=dtype))
    builder = make_builder({NAME.format(0): impl})
    assert impl.dense_reason is None
    with_sinks = assert_as_flash_attention(impl, builder, MIXED, calls)
    impl.sinks = None
    assert not torch.equal(assert_as_flash_attention(impl, builder, MIXED, calls), with_sinks)


def assert_as_flash_attention(impl: Any, builder: Any, batch: tuple[Row, ...], calls: list[Any]) -> torch.Tensor:
    """A step that is partly FlashAttention's gives what FlashAttention would give for all of it; returns the output."""
    calls.clear()
    common = make_common(*batch)
    metadata = builder.build(0, common)
    query, cache = make_step(common)
    output = attend(impl, query, cache, metadata)
    assert calls == [of_run for _, of_run in metadata.minference.dense_runs]
    expected = torch.full_like(query, 7.0)
    flash_attention(impl, None, query, None, None, cache, metadata, expected)
    torch.testing.assert_close(output, expected, rtol=1.6e-2, atol=1e-2)
    assert (output[common.num_actual_tokens :] == 7.0).all()
    return output


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_tokens_are_counted_once_and_pairs_for_every_layer(groups: int, calls: list[Any]) -> None:
    # A model may have several KV cache groups; vLLM's V1 runner builds the metadata of the first one alone.
    runtime = make_runtime()
    layers = [[make_impl(runtime), make_impl(runtime)] for _ in range(groups)]
    config, names = make_config(), iter(range(2 * groups))
    named = [{NAME.format(next(names)): impl for impl in impls} for impls in layers]
    for impls in named:
        add_layers(impls, config)
    builders = [make_builder(impls, config) for impls in named]
    common = make_common(LONG)
    query, cache = make_step(common)
    first = builders[0].build(0, common)
    for builder, impls in zip(builders, layers, strict=True):
        metadata = builder.update_block_table(first, first.block_table, first.slot_mapping)
        for impl in impls:
            attend(impl, query, cache, metadata)
    assert counted(runtime) == {("sparse", "gate_open"): LONG.rows}
    assert layers[0][0].layer_state.attend.kept_pairs.item() == runtime.account.causal_pairs > 0
