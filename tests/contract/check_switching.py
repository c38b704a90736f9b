# SPDX-License-Identifier: Apache-2.0
"""Layers are ours only in steps that have a plan. Run by test_vllm_033.py, with that release on the path."""

from typing import Any

from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from tests.contract.fakes import (
    DECODE,
    LONG,
    MIXED,
    NAME,
    SHORT,
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


def test_layers_are_flash_attentions_own_from_a_step_without_a_plan_to_the_next_with_one() -> None:
    _, builder, impls = one_group()
    assert not any(map(stepped_aside, impls))  # the profiling run has no metadata
    for batch, aside in (((SHORT,), True), ((DECODE,), True), (MIXED, False), ((LONG,), False), ((DECODE,), True)):
        builder.build(0, make_common(*batch))
        assert all(stepped_aside(impl) is aside for impl in impls), batch


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
        second.update_block_table(metadata, metadata.block_table, metadata.slot_mapping)
        assert all(stepped_aside(impl) is aside for impl in impls)


def test_a_second_builder_finds_the_layers_looking_for_a_plan() -> None:
    _, builder, impls = one_group()
    builder.build(0, make_common(DECODE))
    again = make_builder({NAME.format(i): impl for i, impl in enumerate(impls)})
    assert has_plan(again.build(0, make_common(LONG)))
    assert not any(map(stepped_aside, impls))
