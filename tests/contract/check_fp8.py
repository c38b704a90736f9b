# SPDX-License-Identifier: Apache-2.0
"""Our layers over a cache in FP8, with queries that vLLM has quantized. Run by test_vllm_033.py, with that release on
the path.

FlashAttention itself needs a GPU: dense attention in torch stands in for its forward.
"""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.attention.attention import Attention, set_default_quant_scales
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape
from vllm.platforms import current_platform
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl

from minference_vllm.chunk import FP8, PagedKV
from minference_vllm.compat import quantization
from minference_vllm.reason import Reason
from minference_vllm.reference.dense import dense
from minference_vllm.scratch import num_bytes
from tests.contract.check_layer import make_step
from tests.contract.fakes import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LONG,
    MIXED,
    NAME,
    SHORT,
    Row,
    add_layers,
    counted,
    make_builder,
    make_common,
    make_config,
    make_impl,
    make_runtime,
)

NAMES = ("_q_scale", "_k_scale", "_v_scale")
SCALES = {
    "number": [torch.tensor(scale) for scale in (0.03, 0.02, 0.05)],
    "one": [torch.tensor([scale]) for scale in (0.03, 0.02, 0.05)],
    "a KV head": [torch.tensor([scale, scale / 2]) for scale in (0.03, 0.02, 0.05)],
}
every_kind = pytest.mark.parametrize("scales", [pytest.param(scales, id=kind) for kind, scales in SCALES.items()])


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn, "flash_attn_supports_kv_cache_dtype", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(FlashAttentionImpl, "forward", flash_attention)


def flash_attention(
    self: Any, layer: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Any, output: Any, *scales: Any
) -> Any:
    """What FlashAttentionImpl.forward computes over such a cache."""
    k, v = cache.view(FP8).split(self.head_size, dim=-1)
    q_scale, k_scale, v_scale = (getattr(layer, name).expand(self.num_kv_heads) for name in NAMES)
    starts = metadata.query_start_loc.tolist()
    for request, seq_len in enumerate(metadata.seq_lens.tolist()):
        rows = slice(starts[request], starts[request + 1])
        kv = PagedKV(k, v, metadata.block_table, request, k_scale, v_scale)
        context_len = seq_len - (rows.stop - rows.start)
        dense(query[rows], kv, context_len, self.scale, output[rows], q_scale if query.dtype == FP8 else None)
    return output


def layer_of(scales: list[torch.Tensor]) -> torch.nn.Module:
    layer = torch.nn.Module()
    for name, scale in zip(NAMES, scales, strict=True):
        layer.register_buffer(name, scale)
    return layer


def quantized(query: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantizes a query as vLLM's layer does before it calls our forward."""
    width = GroupShape(-1, HEAD_DIM * HEADS // KV_HEADS) if scale.numel() > 1 else GroupShape.PER_TENSOR
    # The operation itself could not be made without an engine's configuration.
    settings = SimpleNamespace(
        static=True, is_group_quant=width.is_per_group(), group_shape=width, num_token_padding=None
    )
    return QuantFP8.forward_native(settings, query.flatten(1), scale)[0].view_as(query)


def make_quantized_step(common: Any, scales: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and the bytes of a cache, each as vLLM hands them over."""
    query, cache = make_step(common)
    k_scale, v_scale = (scale.expand(KV_HEADS) for scale in scales[1:])
    steps = torch.cat([scale[:, None, None].expand(-1, 1, HEAD_DIM) for scale in (k_scale, v_scale)], -1)
    stored = (cache.float() / steps).clamp(-448, 448).to(FP8)
    return quantized(query, scales[0]), stored.view(torch.uint8)


def one_layer(scales: list[torch.Tensor], **changes: Any) -> tuple[Any, Any, Any]:
    runtime = make_runtime()
    impl = make_impl(runtime, **{"kv_cache_dtype": "fp8", **changes})
    named = dict(zip(NAMES, scales, strict=True))
    return runtime, make_builder({NAME.format(0): impl}, dtype=torch.uint8, scales=named), impl


@every_kind
@pytest.mark.parametrize("batch", [(LONG,), MIXED, (SHORT, LONG)], ids=len)
@pytest.mark.parametrize("is_quantized", [True, False], ids=["queries in FP8", "queries in bf16"])
def test_a_full_budget_gives_what_flash_attention_gives(
    scales: list[torch.Tensor], batch: tuple[Row, ...], is_quantized: bool
) -> None:
    runtime, builder, impl = one_layer(scales)
    common = make_common(*batch)
    metadata = builder.build(0, common)
    query, cache = make_quantized_step(common, scales)
    if not is_quantized:
        query, _ = make_step(common)
    layer = layer_of(scales)
    output = torch.full(query.shape, 7.0, dtype=torch.bfloat16)
    impl.forward(layer, query, None, None, cache, metadata, output)
    expected = torch.full_like(output, 7.0)
    flash_attention(impl, layer, query, None, None, cache, metadata, expected)
    torch.testing.assert_close(output, expected, rtol=1.6e-2, atol=1e-2)
    assert (output[common.num_actual_tokens :] == 7.0).all()
    assert counted(runtime)["sparse", "gate_open"] == LONG.rows * batch.count(LONG)
    assert ("dense", "sparse_fault") not in counted(runtime)


def test_scales_are_those_of_the_moment() -> None:
    # vLLM may load weights, and scales with them, again while it serves or when it wakes from a sleep.
    _, builder, impl = one_layer(SCALES["number"])
    common = make_common(LONG)
    metadata, (query, cache) = builder.build(0, common), make_quantized_step(common, SCALES["number"])
    outputs = []
    for factor in (1.0, 2.0):
        layer = layer_of([*SCALES["number"][:2], SCALES["number"][2] * factor])
        outputs.append(torch.empty(query.shape, dtype=torch.bfloat16))
        impl.forward(layer, query, None, None, cache, metadata, outputs[-1])
    rows = slice(0, common.num_actual_tokens)
    torch.testing.assert_close(outputs[1][rows], outputs[0][rows] * 2, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3"])
def test_such_a_layer_may_go_sparse(name: str) -> None:
    _, _, impl = one_layer(SCALES["number"], kv_cache_dtype=name)
    assert impl.dense_reason is None
    assert impl.supports_quant_query_input
    assert impl.shape.has_fp8_kv
    assert impl.shape.has_fp8_q


@pytest.mark.parametrize(
    "scales",
    [
        pytest.param([torch.tensor(1.0), torch.ones(KV_HEADS + 1), torch.tensor(1.0)], id="another number of heads"),
        pytest.param([torch.tensor(1.0, dtype=torch.float64)] * 3, id="float64"),
    ],
)
def test_other_scales_keep_a_layer_dense(scales: list[torch.Tensor]) -> None:
    assert one_layer(scales)[2].dense_reason is Reason.QUANTIZED_KV


def test_a_layer_without_scales_stays_dense() -> None:
    impl = make_impl(make_runtime(), kv_cache_dtype="fp8")
    make_builder({NAME.format(0): impl}, dtype=torch.uint8)
    assert impl.dense_reason is Reason.QUANTIZED_KV


def test_fp8_of_another_kind_keeps_a_layer_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on AMD's GPUs, where the same bits stand for other numbers.
    monkeypatch.setattr(type(current_platform), "fp8_dtype", classmethod(lambda _: torch.float8_e4m3fnuz))
    assert one_layer(SCALES["number"])[2].dense_reason is Reason.QUANTIZED_KV


def test_layers_with_and_without_a_cache_in_fp8_have_scratch_of_their_own() -> None:
    # vLLM's option --kv-cache-dtype-skip-layers makes such models.
    runtime, config = make_runtime(), make_config()
    plain, fp8 = make_impl(runtime), make_impl(runtime, kv_cache_dtype="fp8")
    add_layers({NAME.format(0): plain}, config)
    add_layers({NAME.format(1): fp8}, config, torch.uint8, scales=dict(zip(NAMES, SCALES["one"], strict=True)))
    plain.decide()
    fp8.decide()
    assert (plain.dense_reason, fp8.dense_reason) == (None, None)
    (of_plain, *_), (of_fp8, *_) = runtime._buffers.values()
    assert of_plain is not of_fp8
    assert num_bytes(of_plain) == num_bytes(of_fp8)


# What vLLM does


def test_a_layer_of_vllms_has_the_scales_that_we_read() -> None:
    layer = torch.nn.Module()
    set_default_quant_scales(layer, register_buffer=True)
    for scale in quantization.fp8_scales(layer, 8) or pytest.fail("none found"):
        assert torch.equal(scale, torch.ones(8))


def test_vllm_stores_bytes_and_flash_attention_takes_no_other_numbers() -> None:
    for name in ("fp8", "fp8_e4m3"):
        assert name in FlashAttentionBackend.supported_kv_cache_dtypes
        assert kv_cache_dtype_str_to_dtype(name, None) == torch.uint8
        assert quantization.is_fp8(name)
    assert current_platform.fp8_dtype() == FP8
    source = inspect.getsource(flash_attn.FlashAttentionImpl)
    assert "key_cache.view(current_platform.fp8_dtype())" in source
    for name in NAMES:
        assert f"layer.{name}.expand(descale_shape)" in source
    assert "self.query_quant(query, self._q_scale)" in inspect.getsource(Attention.forward)
