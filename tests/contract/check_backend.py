# SPDX-License-Identifier: Apache-2.0
"""Our builder and implementation on top of vLLM's. Run by test_vllm_033.py, with that release on the path.

FlashAttention itself needs a GPU: a dense twin in torch stands in for its forward. Its builder runs as it is.
"""

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadataBuilder

from minference_vllm.index import PagedKV
from minference_vllm.plan import Reason, SparseChunk
from minference_vllm.reference.dense import dense
from tests.contract.fakes import (
    DECODE,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LONG,
    MIXED,
    PAGE,
    SHORT,
    Row,
    make_builder,
    make_common,
    make_config,
    make_impl,
    make_runtime,
)

NAME = "model.layers.{}.self_attn.attn"
TENSORS_OF_A_RUN = {"query_start_loc", "seq_lens", "block_table", "slot_mapping"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The metadata of every call of FlashAttention, each of which writes dense attention."""
    seen: list[Any] = []

    def forward(self: Any, layer: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Any, output: Any,
                *scales: Any) -> Any:  # fmt: skip
        seen.append(metadata)
        if metadata is None:
            return output.fill_(0)
        if any(scale is not None for scale in scales):
            raise NotImplementedError
        k, v = cache.split(self.head_size, dim=-1)
        starts = metadata.query_start_loc.tolist()
        assert starts[-1] == metadata.num_actual_tokens <= len(query)
        for request, seq_len in enumerate(metadata.seq_lens.tolist()):
            rows = slice(starts[request], starts[request + 1])
            if rows.stop > rows.start:
                kv = PagedKV(k, v, metadata.block_table, request)
                dense(query[rows], kv, seq_len - (rows.stop - rows.start), self.scale, output[rows])
        return output

    monkeypatch.setattr(FlashAttentionImpl, "forward", forward)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return seen


@pytest.fixture(autouse=True)
def scheduled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlashAttention-3 makes a schedule for each batch."""
    monkeypatch.setattr(FlashAttentionMetadataBuilder, "_get_scheduler_metadata", lambda *_, **__: torch.ones(5))
    return


def one_group(layers: int = 2, **settings: Any) -> tuple[Any, Any, list[Any]]:
    """Runtime, builder and implementations of a model with one KV cache group."""
    runtime = make_runtime(**settings)
    impls = [make_impl(runtime) for _ in range(layers)]
    return runtime, make_builder({NAME.format(i): impl for i, impl in enumerate(impls)}), impls


def counted(runtime: Any) -> dict[tuple[str, str], int]:
    return dict(runtime.counters.snapshot().tokens)


def make_step(common: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries, padded as for a CUDA graph, and a cache in the memory order of vLLM's default layout."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(common.num_actual_tokens + 5, HEADS, HEAD_DIM, generator=generator).bfloat16()
    pages = common.block_table_tensor.numel()
    cache = torch.randn(pages, PAGE, KV_HEADS, 2 * HEAD_DIM, generator=generator).bfloat16().transpose(1, 2)
    return query, cache


def attend(impl: Any, query: torch.Tensor, cache: torch.Tensor, metadata: Any, **extra: Any) -> torch.Tensor:
    output = torch.full_like(query, 7.0)
    assert impl.forward(torch.nn.Module(), query, None, None, cache, metadata, output, **extra) is output
    return output


def test_a_mixed_step_is_split_into_chunks_and_runs() -> None:
    runtime, builder, _ = one_group()
    metadata = builder.build(0, make_common(*MIXED))
    assert metadata.minference.chunks == (SparseChunk(1, 1, 140, 60), SparseChunk(4, 162, 140, 60))
    assert [(run.first, run.end) for run, _ in metadata.minference.dense_runs] == [(0, 1), (2, 4)]
    assert counted(runtime) == {("sparse", "gate_open"): 280, ("dense", "below_min_seq_len"): 20}


def test_the_metadata_of_a_run_is_that_of_the_run_as_a_batch() -> None:
    _, builder, _ = one_group()
    common = make_common(*MIXED)
    metadata = builder.build(0, common)
    assert metadata.scheduler_metadata is not None
    run, ours = metadata.minference.dense_runs[1]
    alone = builder.build(
        0,
        make_common(
            *MIXED[2:4],
            block_table_tensor=common.block_table_tensor[2:4],
            slot_mapping=common.slot_mapping[run.query_start : run.query_end],
        ),
    )
    assert (ours.scheduler_metadata, ours.max_num_splits) == (None, 0)
    for field in dataclasses.fields(ours):
        value, expected = getattr(ours, field.name), getattr(alone, field.name)
        if isinstance(expected, torch.Tensor) and field.name != "scheduler_metadata":
            assert torch.equal(value, expected), field.name
            assert field.name in TENSORS_OF_A_RUN
        elif field.name != "scheduler_metadata":
            assert value == expected, field.name


@pytest.mark.parametrize("batch", [(DECODE,) * 3, (DECODE, Row(5, 200, prefill=False))], ids=["decode", "verification"])
def test_a_step_without_prefill_carries_no_plan_and_is_not_counted(batch: tuple[Row, ...]) -> None:
    runtime, builder, _ = one_group()
    assert builder.build(0, make_common(*batch)).minference is None
    assert counted(runtime) == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"is_prefilling": None}, Reason.NO_HOST_METADATA, id="no prefill flags"),
        pytest.param({"seq_lens_cpu_upper_bound": None}, Reason.NO_HOST_METADATA, id="no lengths"),
        pytest.param({"seq_lens_cpu_upper_bound": torch.tensor([200])}, Reason.NO_HOST_METADATA, id="too few lengths"),
        pytest.param({"is_prefilling": torch.tensor([True])}, Reason.NO_HOST_METADATA, id="too few flags"),
        pytest.param({"causal": False}, Reason.NOT_CAUSAL, id="not causal"),
        pytest.param({"causal": torch.ones(2, dtype=torch.int32)}, Reason.NOT_CAUSAL, id="causal by request"),
        pytest.param({"logits_indices_padded": torch.tensor([3])}, Reason.FAST_PREFILL, id="fast prefill"),
        pytest.param({"mm_req_doc_ranges": {0: [(0, 9)]}}, Reason.MM_PREFIX, id="image seen from both sides"),
        pytest.param({"rswa_prefix_lens": torch.tensor([9, 9])}, Reason.RSWA, id="reference sliding window"),
    ],
)
def test_a_step_runs_dense_for_a_named_reason(changes: dict[str, Any], reason: Reason) -> None:
    config = make_config(rswa_window=64, is_mm_prefix_lm=True)
    runtime = make_runtime()
    builder = make_builder({NAME.format(0): make_impl(runtime)}, config)
    assert builder.build(0, make_common(LONG, LONG)).minference is not None
    before = counted(runtime)
    assert builder.build(0, make_common(LONG, LONG, **changes)).minference is None
    after = counted(runtime)
    assert after.pop(("dense", reason.value)) == 280
    assert after == before


def test_steps_of_a_draft_model_and_of_graph_capture_carry_no_plan() -> None:
    runtime, builder, _ = one_group()
    common = make_common(LONG, DECODE)
    assert builder.build(0, common, fast_build=True).minference is None
    assert builder.build_for_drafting(common, 0).minference is None
    assert builder.build_for_cudagraph_capture(common).minference is None
    assert counted(runtime) == {}


def test_another_groups_block_table_reaches_the_dense_runs() -> None:
    _, builder, _ = one_group()
    metadata = builder.build(0, make_common(*MIXED))
    table, slots = metadata.block_table + 1, metadata.slot_mapping + 1
    updated = builder.update_block_table(metadata, table, slots)
    assert updated.minference.chunks == metadata.minference.chunks
    run, ours = updated.minference.dense_runs[1]
    assert torch.equal(ours.block_table, table[2:4])
    assert torch.equal(ours.slot_mapping, slots[run.query_start : run.query_end])


@pytest.mark.parametrize("batch", [(DECODE,), MIXED], ids=["decode", "mixed"])
def test_metadata_that_vllm_has_copied_field_by_field_is_dense(batch: tuple[Row, ...], calls: list[Any]) -> None:
    # vLLM's fast prefill for layers that share a cache does so, and the copy has no plan.
    _, builder, impls = one_group()
    common = make_common(*batch)
    copied = dataclasses.replace(builder.build(0, common))
    updated = builder.update_block_table(copied, copied.block_table, copied.slot_mapping)
    attend(impls[0], *make_step(common), updated)
    assert calls == [updated]


LAYER_REASONS = [
    pytest.param({"attn_type": AttentionType.ENCODER_ONLY}, {}, Reason.NOT_DECODER, id="encoder"),
    pytest.param({"sliding_window": 128}, {}, Reason.SLIDING_WINDOW, id="sliding window"),
    pytest.param({"alibi_slopes": [0.5] * HEADS}, {}, Reason.ALIBI, id="alibi"),
    pytest.param({"logits_soft_cap": 30.0}, {}, Reason.SOFT_CAP, id="soft cap"),
    pytest.param({"sinks": torch.zeros(HEADS)}, {}, Reason.ATTENTION_SINKS, id="sinks"),
    pytest.param({"kv_cache_dtype": "fp8"}, {}, Reason.QUANTIZED_KV, id="fp8 cache"),
    pytest.param({"head_size": 96}, {}, Reason.HEAD_DIM, id="head_dim 96"),
    pytest.param({"kv_sharing_target_layer_name": NAME.format(0)}, {}, Reason.KV_SHARING, id="shared cache"),
    pytest.param({}, {"dcp": 2}, Reason.CONTEXT_PARALLEL, id="decode context parallel"),
    pytest.param({}, {"pcp": 2}, Reason.CONTEXT_PARALLEL, id="prefill context parallel"),
]


@pytest.fixture
def any_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU on which FlashAttention takes every kind of layer."""
    monkeypatch.setattr(flash_attn, "flash_attn_supports_kv_cache_dtype", lambda *_, **__: True)
    monkeypatch.setattr(flash_attn, "flash_attn_supports_sinks", lambda: True)


def assert_dense(impl: Any, reason: Reason, calls: list[Any]) -> None:
    """The layer goes to FlashAttention as it came, whatever the step's plan says."""
    runtime, builder, _ = one_group()
    common = make_common(*MIXED)
    metadata = builder.build(0, common)
    query, cache = make_step(common)
    if impl.head_size == HEAD_DIM:
        attend(impl, query, cache, metadata)
    else:
        attend(
            impl, query[..., :1].expand(-1, -1, impl.head_size), cache[..., :1].expand(*cache.shape[:3], 192), metadata
        )
    assert calls == [metadata]
    assert impl.dense_reason is reason


@pytest.mark.usefixtures("any_gpu")
@pytest.mark.parametrize(("arguments", "parallel", "reason"), LAYER_REASONS)
def test_a_layer_runs_dense_for_a_named_reason(
    arguments: dict[str, Any], parallel: dict[str, int], reason: Reason, calls: list[Any]
) -> None:
    runtime = make_runtime()
    impl = make_impl(runtime, make_config(**parallel), **arguments)
    assert_dense(impl, reason, calls)
    builder = make_builder({NAME.format(0): impl})
    assert builder.build(0, make_common(LONG)).minference is None
    assert counted(runtime) == {("dense", reason.value): LONG.rows}


def test_batch_invariance_keeps_every_layer_dense(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    impl = make_impl(make_runtime())
    monkeypatch.delenv("VLLM_BATCH_INVARIANT")
    assert_dense(impl, Reason.BATCH_INVARIANT, calls)


@pytest.mark.parametrize(
    ("name", "mark", "reason"),
    [
        (NAME.format(0), {}, Reason.DENSE_LAYER),
        (NAME.format(1), {}, None),
        (NAME.format(3), {}, None),
        (NAME.format(4), {}, Reason.DRAFT_LAYER),  # the model has four
        (NAME.format(3), {"is_draft_layer": True}, Reason.DRAFT_LAYER),
        ("decoder.attn", {}, None),
        ("layers.0.blocks.1.attn", {}, None),
    ],
)
def test_the_place_of_a_layer_decides(name: str, mark: dict[str, bool], reason: Reason | None) -> None:
    impl = make_impl(make_runtime(dense_layers=1))
    config = make_config()
    make_builder({name: impl}, config)
    config.compilation_config.static_forward_context[name].__dict__.update(mark)
    make_builder_again = type(make_builder({"model.layers.2.attn": make_impl(impl.runtime)}))
    assert make_builder_again
    assert impl.dense_reason is reason or mark


def test_a_cache_of_another_dtype_keeps_a_group_dense() -> None:
    runtime = make_runtime()
    impl = make_impl(runtime)
    make_builder({NAME.format(0): impl}, dtype=torch.uint8)
    assert impl.dense_reason is Reason.DTYPE


def test_a_step_without_a_plan_is_flash_attentions(calls: list[Any]) -> None:
    _, builder, impls = one_group()
    common = make_common(DECODE, SHORT)
    metadata = builder.build(0, common)
    attend(impls[0], *make_step(common), metadata)
    assert calls == [metadata]


def test_a_stream_that_is_being_captured_is_flash_attentions(monkeypatch: pytest.MonkeyPatch, calls: list[Any]) -> None:
    _, builder, impls = one_group()
    common = make_common(*MIXED)
    metadata = builder.build(0, common)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    attend(impls[0], *make_step(common), metadata)
    assert calls == [metadata]


@pytest.mark.parametrize("batch", [(LONG,), MIXED], ids=["all sparse", "mixed"])
def test_fused_output_quantisation_is_refused_as_by_flash_attention(batch: tuple[Row, ...], calls: list[Any]) -> None:
    _, builder, impls = one_group()
    common = make_common(*batch)
    metadata = builder.build(0, common)
    with pytest.raises(NotImplementedError):
        attend(impls[0], *make_step(common), metadata, output_scale=torch.ones(1))


def test_the_profiling_run_claims_the_scratch(calls: list[Any]) -> None:
    runtime, _, impls = one_group()
    query, cache = make_step(make_common(LONG))
    claimed = sum(workspace.num_bytes for workspace in runtime._workspaces.values())
    assert (attend(impls[0], query, cache, None) == 0).all()
    assert sum(workspace.num_bytes for workspace in runtime._workspaces.values()) > claimed == 0
    attend(impls[1], query, cache, None)
    assert len(runtime._workspaces) == 1


@pytest.mark.parametrize("batch", [MIXED, (LONG,), (LONG, LONG, DECODE), (SHORT, LONG)], ids=len)
def test_a_full_budget_gives_what_flash_attention_gives_for_the_whole_step(
    batch: tuple[Row, ...], calls: list[Any]
) -> None:
    runtime, builder, impls = one_group()
    common = make_common(*batch)
    metadata = builder.build(0, common)
    query, cache = make_step(common)
    output = attend(impls[0], query, cache, metadata)
    assert calls == [ours for _, ours in metadata.minference.dense_runs]
    expected = torch.full_like(query, 7.0)
    FlashAttentionImpl.forward(impls[0], None, query, None, None, cache, metadata, expected)
    torch.testing.assert_close(output, expected, rtol=1.6e-2, atol=1e-2)
    assert (output[common.num_actual_tokens :] == 7.0).all()


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_tokens_are_counted_once_and_pairs_for_every_layer(groups: int, calls: list[Any]) -> None:
    # A hybrid model has a builder for each KV cache group, and vLLM's V1 runner calls build() of the first alone.
    runtime = make_runtime()
    layers = [[make_impl(runtime), make_impl(runtime)] for _ in range(groups)]
    builders = [
        make_builder({NAME.format(2 * group + i): impl for i, impl in enumerate(impls)}, make_config(layers=8))
        for group, impls in enumerate(layers)
    ]
    common = make_common(LONG)
    query, cache = make_step(common)
    metadata = builders[0].build(0, common)
    for builder, impls in zip(builders, layers, strict=True):
        if builder is not builders[0]:
            metadata = builder.update_block_table(metadata, metadata.block_table, metadata.slot_mapping)
        for impl in impls:
            attend(impl, query, cache, metadata)
    assert counted(runtime) == {("sparse", "gate_open"): LONG.rows}
    assert runtime._kept_pairs.item() == runtime._causal_pairs
