# SPDX-License-Identifier: Apache-2.0
"""What we ask of vLLM about pipeline stages, in the vLLM that is installed. The contract tests run it too."""

from types import SimpleNamespace
from typing import Any

import pytest

from minference_vllm import compat
from minference_vllm.pipeline import ONE_STAGE, Pipeline
from tests.conftest import import_or_skip

import_or_skip("vllm.distributed.parallel_state")


def stage_of(monkeypatch: pytest.MonkeyPatch, stage: int, stages: int, num_layers: int, **text: Any) -> Pipeline:
    group = SimpleNamespace(rank_in_group=stage, world_size=stages)
    monkeypatch.setattr("vllm.distributed.parallel_state.get_pp_group", lambda: group)
    architecture = SimpleNamespace(total_num_hidden_layers=num_layers)
    config = SimpleNamespace(model_arch_config=architecture, hf_text_config=SimpleNamespace(**text))
    return compat.pipeline(SimpleNamespace(model_config=config))


def test_layers_are_divided_among_stages_as_vllm_divides_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stage_of(monkeypatch, 0, 1, 4) is ONE_STAGE
    assert stage_of(monkeypatch, 1, 2, 4) == Pipeline(1, (frozenset({0, 1}), frozenset({2, 3})))
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,3")
    assert stage_of(monkeypatch, 0, 2, 4).layers == (frozenset({0}), frozenset({1, 2, 3}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, [set(), {3}]),
        ({"layers_block_type": ["mamba", "mamba", "attention", "mamba"]}, [set(), {2}]),
        ({"layer_types": None}, [{0, 1}, {2, 3}]),
        ({"layer_types": ["sliding_attention"] * 4}, [{0, 1}, {2, 3}]),
    ],
)
def test_layers_that_do_not_attend_to_the_whole_prompt_are_left_out_where_the_model_tells(
    text: dict[str, Any], expected: list[set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(stage_of(monkeypatch, 0, 2, 4, **text).layers) == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_each_stages_first_tensor_parallel_rank_reports(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.distributed.parallel_state.get_tp_group", lambda: SimpleNamespace(rank_in_group=rank))
    assert compat.reports_metrics() is (rank == 0)
