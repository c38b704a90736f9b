# SPDX-License-Identifier: Apache-2.0
"""What planning a step reads, and what it must not read. Run by test_vllm_033.py, with that release on the path."""

import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import vllm
from vllm.model_executor.layers.attention.encoder_only_attention import create_encoder_only_attention_backend
from vllm.model_executor.models.whisper_causal import create_whisper_attention_backend_with_block_pooling
from vllm.v1.attention.backend import AttentionType

from minference_vllm.backend import MInferenceBackend
from minference_vllm.compat import steps
from minference_vllm.plan import ALL_DENSE
from tests.contract.fakes import (
    DECODE,
    LONG,
    MIXED,
    NAME,
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

LONG_ANSWER = Row(1, 400, prefill=False)
UNREAD: Any = object()  # an attempt to read it fails
BLOCK_POOLING = create_whisper_attention_backend_with_block_pooling(MInferenceBackend, 4, 64)


def test_below_the_gate_lengths_are_not_copied() -> None:
    runtime, builder, _ = one_group()
    common = make_common(DECODE, SHORT, SHORT, seq_lens_cpu_upper_bound=UNREAD)
    assert builder.plan_step(common, None) == (ALL_DENSE, None)
    assert counted(runtime) == {("dense", "below_min_seq_len"): 2 * SHORT.rows}


def test_steps_that_decode_leave_nothing_to_count() -> None:
    runtime, builder, _ = one_group()
    unread = {"query_start_loc_cpu": UNREAD, "seq_lens_cpu_upper_bound": UNREAD, "is_prefilling": UNREAD}
    assert builder.plan_step(make_common(DECODE, LONG_ANSWER, **unread), None) == (ALL_DENSE, None)
    assert not runtime.counters._deferred
    verification = Row(5, 300, prefill=False)  # of draft tokens
    assert builder.plan_step(make_common(LONG_ANSWER, verification), None) == (ALL_DENSE, None)
    assert counted(runtime) == {}


@pytest.mark.parametrize(
    "batch", [(DECODE, SHORT), (LONG_ANSWER, SHORT), (LONG, SHORT)], ids=["short", "long", "sparse"]
)
def test_what_the_v1_runner_overwrites_is_copied(batch: tuple[Row, ...]) -> None:
    runtimes = [make_runtime() for _ in range(2)]
    for runtime, is_v2 in zip(runtimes, (True, False), strict=True):
        config = make_config(v2=is_v2)
        builder = make_builder({NAME.format(0): make_impl(runtime, config)}, config)
        common = make_common(*batch)
        _, record = builder.plan_step(common, None)
        if not is_v2:
            for tensor in (common.query_start_loc_cpu, common.seq_lens_cpu_upper_bound, common.is_prefilling):
                tensor.fill_(1)
        if record:
            runtime.finish_step(record)
    assert counted(runtimes[0]) == counted(runtimes[1]) != {}


def test_the_v2_runner_makes_the_arrays_that_describe_a_step_anew() -> None:
    # Our counting thread reads the arrays later. The runner makes new ones so far, but vLLM does not promise it.
    source = Path(vllm.__file__).with_name("v1").joinpath("worker/gpu/model_runner.py").read_text()
    for array, made in {
        "query_start_loc_np": "np.empty(",
        "seq_lens_cpu_upper_bound_np": "np.zeros(",
        "is_prefilling_np": "num_computed_prefill_tokens_np < ",
    }.items():
        assert source.count(f" {array} = {made}") == 1


def test_a_rank_that_publishes_nothing_plans_alike_and_copies_nothing_below_the_gate() -> None:
    runtime = make_runtime(publish=False)
    builder = make_builder({NAME.format(0): make_impl(runtime)})
    unread = {"query_start_loc_cpu": UNREAD, "seq_lens_cpu_upper_bound": UNREAD, "is_prefilling": UNREAD}
    assert builder.plan_step(make_common(SHORT, DECODE, **unread), None) == (ALL_DENSE, None)
    assert builder.plan_step(make_common(*MIXED), None) == one_group()[1].plan_step(make_common(*MIXED), None)
    assert counted(runtime) == {}


def test_what_forbids_a_step_is_asked_only_if_a_chunk_passes_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Mock(return_value=Mock(dense_reason=None))
    monkeypatch.setattr(steps, "step_traits", asked)
    _, builder, _ = one_group()
    assert builder.plan_step(make_common(LONG_ANSWER, Row(120), SHORT), None) == (ALL_DENSE, None)
    assert not asked.called
    assert builder.plan_step(make_common(LONG_ANSWER, LONG), None)[0].chunks
    assert asked.call_count == 1


def test_rows_that_cannot_be_told_apart_count_if_a_chunk_could_have_gone_sparse() -> None:
    runtime, builder, _ = one_group()
    builder.plan_step(make_common(SHORT, DECODE, is_prefilling=None), None)
    assert counted(runtime) == {}
    builder.plan_step(make_common(LONG, DECODE, is_prefilling=None), None)
    assert counted(runtime) == {("dense", "no_host_metadata"): LONG.rows + DECODE.rows}


def test_short_chunks_beside_a_long_context_are_counted_by_why_they_run_dense() -> None:
    runtime, builder, _ = one_group()
    short_chunk = Row(20, 300)
    assert builder.plan_step(make_common(LONG_ANSWER, short_chunk, SHORT, SHORT), None) == (ALL_DENSE, None)
    expected = {("dense", "short_chunk"): short_chunk.rows, ("dense", "below_min_seq_len"): 2 * SHORT.rows}
    assert counted(runtime) == expected
    builder.plan_step(make_common(short_chunk, SHORT, seq_lens_cpu_upper_bound=None), None)  # no reason is known
    assert counted(runtime) == expected


def test_an_encoders_builder_that_vllm_derives_from_ours_plans_nothing() -> None:
    runtime = make_runtime()
    impl = make_impl(runtime, attn_type=AttentionType.ENCODER_ONLY)
    of_encoders = create_encoder_only_attention_backend(MInferenceBackend)
    builder = make_builder({NAME.format(0): impl}, kind=of_encoders.get_builder_cls())
    metadata = builder.build(0, make_common(LONG, SHORT))
    assert not metadata.causal
    assert not has_plan(metadata)
    assert counted(runtime) == {("dense", "not_decoder"): LONG.rows + SHORT.rows}


@pytest.mark.parametrize("window", [64, None], ids=["dense", "sparse"])
def test_rows_of_layers_that_pool_blocks_are_no_prompt_tokens(window: int | None) -> None:
    # Voxtral's audio layers: vLLM multiplies all lengths by 4 before our builder sees them. Their builders come first.
    runtime, config = make_runtime(), make_config()
    audio, text = (make_impl(runtime, config, sliding_window=size) for size in (64, window))
    add_layers({NAME.format(1): text}, config)
    builders = [
        make_builder({"audio.layers.0.attn": audio}, config, kind=BLOCK_POOLING.get_builder_cls()),
        make_builder({NAME.format(1): text}, config),
    ]
    builders[0].vllm_config = config
    steps = [builder.build(0, make_common(SHORT)) for builder in builders]
    assert steps[0].num_actual_tokens == 4 * SHORT.rows
    assert counted(runtime) == {("dense", "sliding_window" if window else "below_min_seq_len"): SHORT.rows}


def test_layers_that_pool_blocks_run_dense() -> None:
    # Their chunks have more rows than there is scratch memory for.
    runtime, config = make_runtime(), make_config()
    builder = make_builder({NAME.format(0): make_impl(runtime)}, config, kind=BLOCK_POOLING.get_builder_cls())
    builder.vllm_config = config
    assert not has_plan(builder.build(0, make_common(LONG)))


def test_a_plan_holds_plain_numbers() -> None:
    # Numbers of PyTorch or NumPy would select another compiled variant of a kernel, and JSON refuses them.
    _, builder, _ = one_group()
    plan, _ = builder.plan_step(make_common(*MIXED), None)
    assert {type(value) for part in (*plan.chunks, *plan.dense_runs) for value in part} == {int, bool}


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        ([NAME.format(2), NAME.format(3)], [2, 3]),
        (["a.3.attn", "b.3.attn"], [0, 1]),
        (["layers.2.attn.0", "layers.3.attn"], [0, 1]),
    ],
    ids=["in the whole model", "two of one number", "no single number"],
)
def test_layers_are_named_by_numbers_that_differ(names: list[str], numbers: list[int]) -> None:
    runtime = make_runtime()
    impls = {name: make_impl(runtime) for name in names}
    make_builder(impls)
    assert [impl.layer_state.number for impl in impls.values()] == numbers


def test_counting_starts_with_the_first_builder() -> None:
    runtime, _, _ = one_group()
    assert runtime.counters.start.called


# A bound in microseconds would fail on a busy machine. benchmarks.steps measures the microseconds, in an engine.
@pytest.mark.parametrize(
    ("batch", "most"),
    [
        pytest.param((DECODE,) * 512, 0.1, id="decode"),
        pytest.param((*(LONG_ANSWER,) * 512, SHORT), 0.2, id="a short prompt beside long answers"),
        pytest.param((SHORT,) * 512, 0.2, id="short prompts"),
    ],
)
def test_steps_below_the_gate_cost_less_than_a_look_at_their_requests(batch: tuple[Row, ...], most: float) -> None:
    _, builder, _ = one_group()
    common = make_common(*batch)
    ratios = []
    for _ in range(300):
        start = time.perf_counter()
        for tensor in (common.query_start_loc_cpu, common.seq_lens_cpu_upper_bound, common.is_prefilling):
            tensor.tolist()
        copied = time.perf_counter()
        builder.plan_step(common, None)
        ratios.append((time.perf_counter() - copied) / (copied - start))
    assert statistics.median(ratios) < most
