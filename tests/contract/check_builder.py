# SPDX-License-Identifier: Apache-2.0
"""Our metadata builder on top of vLLM's. Run by test_vllm_033.py, with that release on the path.

FlashAttention's builder needs no GPU: it runs as it is.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.attention.cross_attention import create_cross_attention_backend
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

from minference_vllm.backend import MInferenceBackend
from minference_vllm.plan import SparseChunk
from minference_vllm.reason import Reason
from tests.contract.fakes import (
    DECODE,
    LONG,
    MIXED,
    NAME,
    NUM_LAYERS,
    SHORT,
    Row,
    add_layers,
    counted,
    finish,
    has_plan,
    make_builder,
    make_common,
    make_config,
    make_impl,
    make_runtime,
    one_group,
)


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Hopper, FlashAttention-3 makes a schedule for each batch; but memory cannot be pinned without a GPU."""
    monkeypatch.setattr(FlashAttentionMetadataBuilder, "_get_scheduler_metadata", lambda *_, **__: torch.ones(5))
    monkeypatch.setattr(flash_attn, "PIN_MEMORY", False)


def test_a_mixed_step_is_split_into_chunks_and_runs() -> None:
    runtime, builder, _ = one_group()
    metadata = builder.build(0, make_common(*MIXED))
    assert metadata.minference.chunks == (SparseChunk(1, 1, 140, 60), SparseChunk(4, 162, 140, 60))
    assert [(run.first, run.end) for run, _ in metadata.minference.dense_runs] == [(0, 1), (2, 4)]
    finish(runtime, metadata)
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
    # The schedule that vLLM has made is that of the whole batch, so a run must not use it.
    assert (ours.scheduler_metadata, ours.max_num_splits) == (None, 0)
    for name in {field.name for field in dataclasses.fields(ours)} - {"scheduler_metadata", "max_num_splits"}:
        value, expected = getattr(ours, name), getattr(alone, name)
        assert type(value) is type(expected), name
        assert (value == expected).all() if isinstance(value, torch.Tensor) else value == expected, name


@pytest.mark.parametrize("batch", [(DECODE,) * 3, (DECODE, Row(5, 200, prefill=False))], ids=["decode", "verification"])
def test_a_step_without_prefill_carries_no_plan_and_is_not_counted(batch: tuple[Row, ...]) -> None:
    runtime, builder, _ = one_group()
    assert not has_plan(builder.build(0, make_common(*batch)))
    assert counted(runtime) == {}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"is_prefilling": None}, Reason.NO_HOST_METADATA, id="no prefill flags"),
        pytest.param({"seq_lens_cpu_upper_bound": None}, Reason.NO_HOST_METADATA, id="no lengths"),
        pytest.param({"seq_lens_cpu_upper_bound": torch.tensor([200])}, Reason.NO_HOST_METADATA, id="too few lengths"),
        pytest.param({"causal": False}, Reason.NOT_CAUSAL, id="not causal"),
        pytest.param({"causal": torch.ones(2, dtype=torch.int32)}, Reason.NOT_CAUSAL, id="causal by request"),
        pytest.param({"logits_indices_padded": torch.tensor([3])}, Reason.FAST_PREFILL, id="fast prefill"),
    ],
)
def test_a_step_runs_dense_for_a_named_reason(changes: dict[str, Any], reason: Reason) -> None:
    runtime, builder, _ = one_group()
    finish(runtime, builder.build(0, make_common(LONG, LONG)))
    before = counted(runtime)
    assert not has_plan(builder.build(0, make_common(LONG, LONG, **changes)))
    after = counted(runtime)
    assert after.pop(("dense", reason.value)) == 280
    assert after == before


def test_padding_rows_need_no_flags() -> None:
    # vLLM pads requests for CUDA graphs, and some of its callers give flags for the real requests only.
    runtime, builder, _ = one_group()
    common = make_common(LONG, Row(0), Row(0), is_prefilling=torch.tensor([True]))
    metadata = builder.build(0, common)
    assert metadata.minference.chunks == (SparseChunk(0, 0, LONG.rows, LONG.context_len),)
    finish(runtime, metadata)
    assert counted(runtime) == {("sparse", "gate_open"): LONG.rows}


@pytest.mark.parametrize(
    ("model", "changes", "reason"),
    [
        pytest.param({"is_mm_prefix_lm": True}, {"mm_req_doc_ranges": {0: [(60, 70)]}}, Reason.MM_PREFIX, id="image"),
        pytest.param({"rswa_window": 64}, {"rswa_prefix_lens": torch.tensor([9])}, Reason.RSWA, id="reference window"),
    ],
)
def test_a_step_of_such_a_model_runs_dense(model: dict[str, Any], changes: dict[str, Any], reason: Reason) -> None:
    runtime = make_runtime()
    builder = make_builder({NAME.format(0): make_impl(runtime)}, make_config(**model))
    assert not has_plan(builder.build(0, make_common(LONG, **changes)))
    assert counted(runtime) == {("dense", reason.value): LONG.rows}
    assert has_plan(builder.build(0, make_common(LONG)))


def test_steps_of_a_draft_model_and_of_graph_capture_carry_no_plan() -> None:
    runtime, builder, _ = one_group()
    common = make_common(LONG, DECODE)
    assert not has_plan(builder.build(0, common, fast_build=True))
    assert not has_plan(builder.build_for_drafting(common, 0))
    assert not has_plan(builder.build_for_cudagraph_capture(common))
    assert counted(runtime) == {}


def test_graphs_are_captured_as_the_builders_that_vllm_derives_from_ours_build() -> None:
    runtime = make_runtime()
    builder = make_builder(
        {NAME.format(0): make_impl(runtime)}, kind=create_cross_attention_backend(MInferenceBackend).get_builder_cls()
    )
    encoder_lens = np.array([64, 48])
    common = make_common(
        DECODE, DECODE, encoder_seq_lens=torch.from_numpy(encoder_lens), encoder_seq_lens_cpu=encoder_lens
    )
    metadata = builder.build_for_cudagraph_capture(common)
    assert metadata.causal is False
    assert metadata.seq_lens.tolist() == [64, 48]
    assert not has_plan(metadata)
    assert counted(runtime) == {}


def test_layers_that_attend_within_chunks_stay_dense_and_do_not_speak_for_the_others() -> None:
    # In Llama 4 the batches of these layers' group carry no flags, and would be counted instead of the global layers'.
    runtime = make_runtime()
    local, whole = (make_impl(runtime) for _ in range(2))
    config = add_layers({NAME.format(1): whole}, make_config())
    groups = [
        make_builder({NAME.format(0): local}, config, chunk_size=64),
        make_builder({NAME.format(1): whole}, config),
    ]
    assert (local.dense_reason, whole.dense_reason) == (Reason.CHUNKED_LOCAL, None)
    assert not has_plan(groups[0].build(0, make_common(LONG, is_prefilling=None)))
    finish(runtime, groups[1].build(0, make_common(LONG)))
    assert counted(runtime) == {("sparse", "gate_open"): LONG.rows}


def test_another_groups_block_table_reaches_the_dense_runs() -> None:
    _, builder, _ = one_group()
    metadata = builder.build(0, make_common(*MIXED))
    table, slots = metadata.block_table + 1, metadata.slot_mapping + 1
    updated = builder.update_block_table(metadata, table, slots)
    assert updated.minference.chunks == metadata.minference.chunks
    run, ours = updated.minference.dense_runs[1]
    assert torch.equal(ours.block_table, table[2:4])
    assert torch.equal(ours.slot_mapping, slots[run.query_start : run.query_end])


def test_a_dense_group_plans_for_a_sparse_one_that_takes_its_metadata_over() -> None:
    # For several groups of one kind vLLM's V1 runner builds the metadata of the first and updates it for the others.
    runtime = make_runtime(dense_layers=1)
    config = make_config()
    impls = {NAME.format(group): make_impl(runtime) for group in range(2)}
    add_layers(impls, config)
    dense, sparse = (make_builder({name: impl}, config) for name, impl in impls.items())
    metadata = dense.build(0, make_common(LONG))
    updated = sparse.update_block_table(metadata, metadata.block_table + 1, metadata.slot_mapping)
    assert updated.minference.chunks == (SparseChunk(0, 0, LONG.rows, LONG.context_len),)


def test_metadata_that_vllm_has_copied_field_by_field_takes_another_block_table() -> None:
    # vLLM copies it so for layers that share a cache and prefill fast. The copy has no plan.
    _, builder, _ = one_group()
    copied = dataclasses.replace(builder.build(0, make_common(*MIXED)))
    table = copied.block_table + 1
    updated = builder.update_block_table(copied, table, copied.slot_mapping)
    assert updated.block_table is table
    assert not has_plan(updated)


@pytest.mark.parametrize(
    ("name", "is_draft_layer", "reason"),
    [
        (NAME.format(0), False, Reason.DENSE_LAYER),
        (NAME.format(1), False, None),
        (NAME.format(NUM_LAYERS - 1), False, None),
        (NAME.format(NUM_LAYERS), False, Reason.DRAFT_LAYER),
        (NAME.format(NUM_LAYERS - 1), True, Reason.DRAFT_LAYER),
        ("decoder.attn", False, None),
        ("layers.0.blocks.1.attn", False, None),
    ],
)
def test_the_place_of_a_layer_decides(name: str, is_draft_layer: bool, reason: Reason | None) -> None:
    runtime = make_runtime(dense_layers=1)
    impl = make_impl(runtime)
    config = make_config()
    config.speculative_config = SimpleNamespace(method="draft_model")
    builder = make_builder({name: impl}, config, is_draft_layer=is_draft_layer)
    assert impl.dense_reason is reason
    metadata = builder.build(0, make_common(LONG))
    assert has_plan(metadata) == (reason is None)
    if reason is None:
        finish(runtime, metadata)
    label = ("dense", reason.value) if reason else ("sparse", "gate_open")
    assert counted(runtime) == {label: LONG.rows}


@pytest.mark.parametrize(
    ("flags", "tokens"),
    [
        pytest.param({}, LONG.rows + SHORT.rows, id="V2 runner"),
        # Without flags nobody knows which rows are prefill; a batch counts if it is long enough to have gone sparse.
        pytest.param({"is_prefilling": None}, LONG.rows, id="V1 runner, without flags"),
    ],
)
def test_both_micro_batches_of_a_step_are_counted(flags: dict[str, Any], tokens: int) -> None:
    # vLLM gives each micro-batch builders of its own.
    runtime = make_runtime()
    config = make_config(ubatching=True)
    groups = [{NAME.format(group): make_impl(runtime, config)} for group in range(2)]
    for group in groups:
        add_layers(group, config)
    builders = [[make_builder(group, config) for group in groups] for _ in range(2)]
    for _ in range(3):  # steps
        for micro_batch, row in zip(builders, (LONG, SHORT), strict=True):
            common = make_common(row, **flags)
            assert not any(has_plan(builder.build(0, common)) for builder in micro_batch)
    assert counted(runtime) == {("dense", "micro_batching"): 3 * tokens}


def test_a_cache_of_another_dtype_keeps_a_group_dense() -> None:
    runtime = make_runtime()
    builder = make_builder({NAME.format(0): make_impl(runtime)}, dtype=torch.uint8)
    assert not has_plan(builder.build(0, make_common(LONG)))
    assert counted(runtime) == {("dense", "dtype"): LONG.rows}


def test_a_group_with_one_sparse_layer_goes_sparse() -> None:
    runtime = make_runtime()
    impls = {NAME.format(0): make_impl(runtime, sliding_window=64), NAME.format(1): make_impl(runtime)}
    finish(runtime, make_builder(impls).build(0, make_common(LONG)))
    assert counted(runtime) == {("sparse", "gate_open"): LONG.rows}


@pytest.mark.parametrize("sparse_group", [0, 1])
def test_tokens_of_a_model_with_windows_are_counted_by_its_sparse_group(sparse_group: int) -> None:
    runtime = make_runtime()
    windows = [None, None]
    windows[1 - sparse_group] = 64
    config = make_config()
    impls = {NAME.format(group): make_impl(runtime, sliding_window=window) for group, window in enumerate(windows)}
    add_layers(impls, config)
    builders = [make_builder({name: impl}, config) for name, impl in impls.items()]
    steps = [builder.build(0, make_common(LONG)) for builder in builders]
    finish(runtime, steps[sparse_group])
    assert counted(runtime) == {("sparse", "gate_open"): LONG.rows}


def test_a_layer_runs_dense_by_its_number_in_the_whole_model() -> None:
    runtime = make_runtime()
    runtime.dense_layers = frozenset({2})
    impls = {NAME.format(number): make_impl(runtime) for number in (2, 3)}  # of a second pipeline stage
    make_builder(impls)
    assert [(impl.index, impl.position) for impl in impls.values()] == [(2, 0), (3, 1)]
    assert [impl.dense_reason for impl in impls.values()] == [Reason.DENSE_LAYER, None]
    assert impls[NAME.format(3)].layer_state.number == 3
