# SPDX-License-Identifier: Apache-2.0
"""Under pipeline parallelism every stage publishes its own layers' numbers, and prompts are counted once."""

from functools import partial
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
import torch

from minference_vllm.budget import Budget
from minference_vllm.chunk import Chunk, PagedKV
from minference_vllm.config import MInferenceConfig
from minference_vllm.metrics.exporter import DirectoryCollector
from minference_vllm.metrics.publisher import METRICS_DIR, MULTIPROC_DIR
from minference_vllm.pipeline import ONE_STAGE, Pipeline
from minference_vllm.reason import Reason
from minference_vllm.record import StepRecord
from minference_vllm.runtime import Runtime
from minference_vllm.scratch import ScratchShape

SHAPE = ScratchShape(2, 1, 64, torch.bfloat16, max_seq_len=512, max_chunk=256)
ROWS = 200
LAYERS = (frozenset({0, 1}), frozenset({2, 3}))
SPARSE = 'minference_prefill_tokens_total{path="sparse",reason="gate_open"}'
FAULTY = 'minference_prefill_tokens_total{path="dense",reason="sparse_fault"}'


def speaking(layers: tuple[frozenset[int], ...], *dense_layers: int) -> list[int]:
    return [stage for stage in range(len(layers)) if Pipeline(stage, layers).speaks(frozenset(dense_layers))]


def test_the_first_stage_with_a_layer_that_may_run_sparse_speaks() -> None:
    assert speaking(LAYERS) == [0]
    assert speaking(LAYERS, 0) == [0]
    assert speaking(LAYERS, 0, 1) == [1]
    assert speaking(LAYERS, 0, 1, 2) == [1]
    assert speaking((frozenset(), *LAYERS), 0, 1) == [2]


def test_if_no_stage_has_such_a_layer_the_first_speaks() -> None:
    assert speaking(LAYERS, 0, 1, 2, 3) == [0]
    assert ONE_STAGE.speaks()
    assert ONE_STAGE.speaks(frozenset(range(80)))


def make_stages(**settings: Any) -> list[Runtime]:
    """The workers that report, one a stage."""
    gate = {"min_seq_len": 128, "min_chunk": 128, "log_every": 0.0}
    config = MInferenceConfig.model_validate({**gate, **settings})
    return [Runtime(config, torch.device("cpu"), publish=True, pipeline=Pipeline(at, LAYERS)) for at in range(2)]


def run_step(stage: Runtime, numbers: frozenset[int]) -> None:
    """A prompt of one chunk, on the stage that has these layers."""
    record = StepRecord("a group", [0, ROWS], [ROWS], [True])
    sparse = numbers - stage.dense_layers
    if not sparse:
        record.layer_reason = Reason.DENSE_LAYER
        stage.counters.defer(record)
        return
    keys = torch.zeros(32, 1, 16, 64, dtype=torch.bfloat16)
    kv = PagedKV(keys, keys, torch.arange(32, dtype=torch.int32)[None], 0)
    q = torch.zeros(ROWS, SHAPE.num_qo_heads, 64, dtype=torch.bfloat16)
    for position, number in enumerate(sorted(numbers)):
        if number in sparse:
            layer = stage.layer_state(SHAPE, position, len(numbers), number, number)
            if not stage.run(partial(Chunk, q, torch.empty_like(q), kv, 0, 1.0), layer):
                stage.failed.add(0)
    stage.finish_step(record)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has stages run one step, and reads what the server then shows."""
    monkeypatch.setenv(METRICS_DIR, str(tmp_path))
    monkeypatch.delenv(MULTIPROC_DIR, raising=False)

    def read(stages: list[Runtime]) -> dict[str, float]:
        for stage, numbers in zip(stages, LAYERS, strict=True):
            run_step(stage, numbers)
            stage.counters.flush()
        registry = prometheus_client.CollectorRegistry()
        registry.register(DirectoryCollector(str(tmp_path)))
        lines = prometheus_client.generate_latest(registry).decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    return read


def measured_layers(page: dict[str, float]) -> set[str]:
    return {name.split('layer="')[1][0] for name in page if name.startswith("minference_recall_mean{")}


def tokens(page: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in page.items() if name.startswith("minference_prefill_tokens_total")}


CAUSAL_PAIRS = SHAPE.num_qo_heads * ROWS * (ROWS + 1) // 2  # of one layer


def test_layers_of_all_stages_are_shown_and_prompts_are_counted_once(page: Any) -> None:
    stages = make_stages()
    shown = page(stages)
    assert tokens(shown) == {SPARSE: ROWS}
    assert shown['minference_prefill_chunks_total{path="sparse",reason="gate_open"}'] == 1
    assert measured_layers(shown) == {"0", "1", "2", "3"}
    assert shown["minference_causal_pairs_total"] == 4 * CAUSAL_PAIRS
    assert 0 < shown["minference_kept_pairs_total"] <= shown["minference_causal_pairs_total"]
    assert shown['minference_recall_heads_total{le="+Inf"}'] == 4 * SHAPE.num_qo_heads
    scratch = [stage.counters.snapshot().scratch_bytes for stage in stages]
    assert shown["minference_scratch_bytes"] == sum(scratch) > scratch[0] > 0


@pytest.mark.parametrize(("dense_layers", "measured"), [(1, {"1", "2", "3"}), (2, {"2", "3"}), (3, {"3"})])
def test_a_stage_whose_layers_are_all_dense_does_not_count_the_prompts(
    dense_layers: int, measured: set[str], page: Any
) -> None:
    shown = page(make_stages(dense_layers=dense_layers))
    assert tokens(shown) == {SPARSE: ROWS}
    assert measured_layers(shown) == measured
    assert shown["minference_causal_pairs_total"] == len(measured) * CAUSAL_PAIRS


def test_where_all_layers_are_dense_the_prompts_are_counted_once_too(page: Any) -> None:
    shown = page(make_stages(dense_layers=4))
    assert tokens(shown) == {'minference_prefill_tokens_total{path="dense",reason="dense_layer"}': ROWS}


def test_a_fault_of_a_stage_that_does_not_count_prompts_is_shown(page: Any, caplog: pytest.LogCaptureFixture) -> None:
    stages = make_stages()

    def fail(*_: Any) -> Any:
        raise RuntimeError

    stages[1].chooser = fail
    with caplog.at_level("ERROR", "vllm.minference"):
        shown = page(stages)
    assert tokens(shown) == {SPARSE: ROWS, FAULTY: ROWS}
    assert sum(count for name, count in shown.items() if name.startswith("minference_requests_total")) == 1
    assert measured_layers(shown) == {"0", "1"}


@pytest.mark.parametrize("dense_layers", [0, 2])
def test_settings_and_a_gate_that_cannot_open_are_said_by_one_stage(
    dense_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(f"minference_vllm.runtime.logger.{level}", lambda text, *_: said.append(text))
    for stage in make_stages(dense_layers=dense_layers, min_chunk=4096):
        stage.counters.start = lambda: None  # type: ignore[method-assign] # no thread a test
        stage.start(32_767, Budget(2048, 2048), has_sparse_layers=True)
    assert said.count("MInference: %s") == 1
    assert said.count("MInference: nothing will run sparse: %s.") == 1


def test_a_fault_names_the_layer_by_its_number_in_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("minference_vllm.runtime.logger.exception", lambda text, *of: said.append(text % of))
    stage = make_stages()[1]
    stage.chooser = None  # type: ignore[assignment]
    run_step(stage, LAYERS[1])
    assert said == ["MInference: sparse attention failed in layer 2; its rows run dense."]
