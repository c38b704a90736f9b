# SPDX-License-Identifier: Apache-2.0
"""After an exception in our code a step runs dense, and serving goes on. Run by test_vllm_033.py, with that release on
the path.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minference_vllm import faults as faults_module
from minference_vllm import step as step_module
from minference_vllm.compat import steps
from minference_vllm.faults import MOST_FAULTS
from minference_vllm.impl import MInferenceImpl
from minference_vllm.plan import ALL_DENSE
from minference_vllm.runtime import Runtime
from tests.contract.check_layer import attend, make_step
from tests.contract.fakes import (
    LONG,
    MIXED,
    NAME,
    SHORT,
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

pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is logged, each as one line: level, message, and whether a traceback comes with it."""
    lines: list[str] = []
    for level in ("exception", "error", "warning"):
        monkeypatch.setattr(
            faults_module.logger, level, lambda text, *of, level=level: lines.append(f"{level}: {text % of}")
        )
    yield lines


# In a layer

SHORT_DENSE = ("dense", "below_min_seq_len")


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
        # Every key is kept here, so sparse and dense attention agree up to rounding.
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
    attend(impls[1], query, cache, builder.build(0, common))  # a success: the faults are no longer in a row
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


def test_after_that_short_prompts_beside_long_ones_still_count_as_short(log: list[str]) -> None:
    runtime, builder, _ = one_group()
    runtime.faults.is_broken = True
    builder.build(0, make_common(*MIXED))
    assert counted(runtime) == {("dense", "sparse_fault"): 2 * LONG.rows, SHORT_DENSE: SHORT.rows}


@pytest.mark.parametrize("part", ["keys_and_values", "scales"])
def test_a_layer_that_cannot_be_read_runs_the_steps_chunks_dense(
    part: str, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, builder, impls = one_group()
    common = make_common(*MIXED)
    query, cache = make_step(common)
    expected = attend(impls[0], query, cache, builder.build(0, common))
    attend(impls[1], query, cache, builder.build(0, common))
    before = counted(runtime)
    with monkeypatch.context() as patch:
        patch.setattr(MInferenceImpl, part, fail)
        metadata = builder.build(0, common)
        output = attend(impls[0], query, cache, metadata)
    torch.testing.assert_close(output, expected, rtol=1.6e-2, atol=1e-2)
    attend(impls[1], query, cache, metadata)
    assert counted(runtime) == {**before, ("dense", "sparse_fault"): 2 * LONG.rows, SHORT_DENSE: 2 * SHORT.rows}
    assert log == ["exception: MInference: sparse attention failed in layer 0; its rows run dense."]


def test_another_rank_tells_its_faults_and_no_prompts() -> None:
    runtime = make_runtime(publish=False)
    runtime.chooser = fail
    impl = make_impl(runtime)
    builder = make_builder({NAME.format(0): impl})
    common = make_common(LONG)
    query, cache = make_step(common)
    for _ in range(MOST_FAULTS + 1):
        attend(impl, query, cache, builder.build(0, common))
    told = runtime.counters.snapshot()
    assert (told.faults, told.broken_ranks, dict(told.tokens), told.scratch_bytes) == (MOST_FAULTS, 1, {}, 0)


# At the end of a step


def test_measurements_that_cannot_be_copied_end_and_the_steps_are_counted(log: list[str]) -> None:
    runtime, builder, impls = one_group(layers=1)
    common = make_common(LONG)
    query, cache = make_step(common)
    attend(impls[0], query, cache, builder.build(0, common))
    before = runtime.counters.snapshot()
    runtime.account._density.copy = fail  # type: ignore[union-attr, method-assign, assignment]
    for _ in range(2):
        attend(impls[0], query, cache, builder.build(0, common))
    after = runtime.counters.snapshot()
    assert counted(runtime) == {("sparse", "gate_open"): 3 * LONG.rows}
    assert (after.kept_pairs, after.causal_pairs) == (before.kept_pairs, before.causal_pairs)
    assert (after.faults, after.broken_ranks) == (1, 0)
    [line] = log
    assert line.startswith("exception: MInference cannot read what sparse attention measured")


# In the builder


@pytest.mark.parametrize("broken", [(steps, "step_traits"), (step_module, "run_metadata")], ids=["plan", "metadata"])
def test_a_step_that_cannot_be_planned_runs_dense(
    broken: tuple[Any, str], log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, builder, _ = one_group()
    monkeypatch.setattr(*broken, fail)
    for _ in range(2):
        assert not has_plan(builder.build(0, make_common(*MIXED)))
    assert counted(runtime) == {("dense", "sparse_fault"): 4 * LONG.rows, SHORT_DENSE: 2 * SHORT.rows}
    assert log == ["exception: MInference: a step could not be planned; it runs dense."]
    assert not runtime.is_broken
    builder.build(0, make_common(*MIXED))
    assert runtime.is_broken


def test_a_step_that_lacks_what_planning_reads_runs_dense_uncounted(log: list[str]) -> None:
    runtime, builder, _ = one_group()
    metadata = SimpleNamespace()
    builder.attach_plan(SimpleNamespace(), metadata)
    assert not has_plan(metadata)
    assert counted(runtime) == {}
    assert [line.split(":")[0] for line in log] == ["exception"]


def test_metadata_that_cannot_be_taken_over_runs_the_other_group_dense(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, config = make_runtime(), make_config()
    groups = [{NAME.format(number): make_impl(runtime)} for number in range(2)]
    for group in groups:
        add_layers(group, config)
    builders = [make_builder(group, config) for group in groups]
    common = make_common(*MIXED)
    query, cache = make_step(common)
    metadata = builders[0].build(0, common)
    expected = attend(groups[0][NAME.format(0)], query, cache, metadata)
    monkeypatch.setattr(step_module, "run_metadata", fail)
    updated = builders[1].update_block_table(metadata, metadata.block_table, metadata.slot_mapping)
    output = attend(groups[1][NAME.format(1)], query, cache, updated)
    torch.testing.assert_close(output, expected, rtol=1.6e-2, atol=1e-2)
    assert counted(runtime) == {("dense", "sparse_fault"): 2 * LONG.rows, SHORT_DENSE: SHORT.rows}
    assert log == ["exception: MInference: a step could not be planned; it runs dense."]


# At the start


def start_with(error: Exception, runtime: Runtime) -> Any:
    """The builder of a server on whose GPU the first launch raises."""

    def dry_run(*_: Any) -> None:
        raise error

    impl = make_impl(runtime)
    runtime.device = torch.device("cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "dry_run", dry_run)
        patch.setattr(runtime, "layer_state", lambda *_: None)
        return make_builder({NAME.format(0): impl})


def test_a_server_whose_kernels_cannot_launch_starts_and_runs_dense(log: list[str]) -> None:
    runtime = make_runtime()
    builder = start_with(RuntimeError("minference_attend: no kernel image\nis available"), runtime)
    [line] = log
    assert line.startswith(
        "exception: MInference: sparse attention cannot run here, and all runs dense: minference_attend"
    )
    assert "no kernel image is available" in line and "minference-vllm doctor" in line
    assert not has_plan(builder.build(0, make_common(LONG)))
    assert counted(runtime) == {("dense", "sparse_fault"): LONG.rows}
    assert runtime.counters.snapshot().broken_ranks == 1


def test_a_server_without_memory_for_the_first_launch_does_not_start(log: list[str]) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        start_with(torch.OutOfMemoryError("none left"), make_runtime())
    assert log == []
