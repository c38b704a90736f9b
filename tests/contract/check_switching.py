# SPDX-License-Identifier: Apache-2.0
"""Layers are ours only while they have a plan to run. Run by test_vllm_033.py, with that release on the path."""

from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from minference_vllm.plan import Reason
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
    has_plan,
    make_builder,
    make_common,
    make_impl,
    make_runtime,
    one_group,
)


def stepped_aside(impl: Any) -> bool:
    """Whether what vLLM calls as the layer's forward is FlashAttention's own."""
    return impl.forward.__func__ is FlashAttentionImpl.forward


def run(impls: list[Any], metadata: Any) -> list[bool]:
    """Run the layers in this order; whether they had all stepped aside after each."""
    tokens = metadata.num_actual_tokens
    query = torch.zeros(tokens, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    cache = torch.zeros(int(metadata.block_table.max()) + 1, KV_HEADS, PAGE, 2 * HEAD_DIM, dtype=torch.bfloat16)
    aside = []
    for impl in impls:
        impl.forward(torch.nn.Module(), query, None, None, cache, metadata, torch.empty_like(query))
        aside.append(all(map(stepped_aside, impls)))
    return aside


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, *arguments: Any) -> torch.Tensor:
        return arguments[-1]

    monkeypatch.setattr(FlashAttentionImpl, "forward", forward)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def test_layers_look_for_a_plan_from_when_it_is_made_until_the_last_has_run_it() -> None:
    _, builder, impls = one_group()
    for batch in (MIXED, (LONG,)):
        for order in (1, -1):
            metadata = builder.build(0, make_common(*batch))
            assert not any(map(stepped_aside, impls))
            assert run(impls[::order], metadata) == [False, True]


@pytest.mark.parametrize("batch", [(SHORT,), (DECODE,)], ids=["short prompt", "decode"])
def test_steps_without_a_plan_leave_the_layers_to_flash_attention(batch: tuple[Row, ...]) -> None:
    _, builder, impls = one_group()
    assert not any(map(stepped_aside, impls))  # the profiling run has no metadata
    for _ in range(2):
        metadata = builder.build(0, make_common(*batch))
        assert run(impls, metadata) == [True, True]
        builder.build(0, make_common(LONG))  # and is broken off


def test_layers_that_always_run_dense_step_aside_with_those_that_do_not() -> None:
    runtime = make_runtime(dense_layers=1)
    impls = [make_impl(runtime) for _ in range(3)]
    builder = make_builder({NAME.format(i): impl for i, impl in enumerate(impls)})
    assert impls[0].dense_reason is Reason.DENSE_LAYER
    metadata = builder.build(0, make_common(LONG))
    assert run(impls, metadata) == [False, False, True]
    assert runtime.counters.snapshot().causal_pairs == runtime._causal_pairs > 0


def test_a_group_without_sparse_layers_is_never_ours() -> None:
    runtime = make_runtime()
    make_builder({NAME.format(0): make_impl(runtime)})
    impls = [make_impl(runtime, sliding_window=64) for _ in range(2)]
    builder = make_builder({NAME.format(i): impl for i, impl in enumerate(impls, 1)})
    assert all(map(stepped_aside, impls))
    assert has_plan(builder.build(0, make_common(LONG)))  # which another group may take over
    assert all(map(stepped_aside, impls))


def test_what_was_kept_is_copied_once_a_step_and_group_after_its_last_layer() -> None:
    runtime, builder, impls = one_group()
    copied: list[int] = []
    runtime.copy_density = lambda: copied.append(runtime._causal_pairs)
    for steps in (1, 2):
        run(impls, builder.build(0, make_common(MIXED[1])))
        run(impls, builder.build(0, make_common(DECODE)))
        assert len(copied) == steps and copied[-1] == runtime._causal_pairs


def test_steps_of_a_draft_model_and_of_graph_capture_leave_the_layers_as_they_are() -> None:
    _, builder, impls = one_group()
    for batch, aside in ((LONG, False), (SHORT, True)):
        builder.build(0, make_common(batch))
        for common in (make_common(LONG), make_common(DECODE)):
            builder.build(0, common, fast_build=True)
            builder.build_for_cudagraph_capture(common)
            assert all(stepped_aside(impl) is aside for impl in impls)


def test_layers_go_by_metadata_that_their_group_takes_over() -> None:
    runtime = make_runtime()
    impls = [make_impl(runtime) for _ in range(2)]
    first, second = (make_builder({NAME.format(i): impl}) for i, impl in enumerate(impls))
    for batch, aside in ((SHORT, True), (LONG, False), (DECODE, True)):
        metadata = first.build(0, make_common(batch))
        updated = second.update_block_table(metadata, metadata.block_table, metadata.slot_mapping)
        assert all(stepped_aside(impl) is aside for impl in impls)
        for impl, of_group in zip(impls, (metadata, updated), strict=True):
            assert run([impl], of_group) == [True]


def test_a_second_builder_finds_the_layers_looking_for_a_plan() -> None:
    _, builder, impls = one_group()
    builder.build(0, make_common(DECODE))
    again = make_builder({NAME.format(i): impl for i, impl in enumerate(impls)})
    assert has_plan(again.build(0, make_common(LONG)))
    assert not any(map(stepped_aside, impls))
