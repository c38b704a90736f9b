# SPDX-License-Identifier: Apache-2.0
"""The method "auto": which file serves a model, what each rank and layer takes of it, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minference_vllm import runtime
from minference_vllm.config import MInferenceConfig
from minference_vllm.errors import ConfigError
from minference_vllm.methods import MAX_TOKENS, Block, VerticalSlash
from minference_vllm.methods.block import BlockSettings
from minference_vllm.methods.vertical_slash import VerticalSlashSettings
from minference_vllm.patterns import AutoSettings, Geometry, Pattern, Resolved, ServedModel, resolve, shipped
from minference_vllm.patterns.file import parse_pattern
from minference_vllm.scratch import ScratchShape
from tests.unit.test_config import load, refusal
from tests.unit.test_patterns import GEOMETRY, HEADS, content

CPU = torch.device("cpu")
YI = ServedModel(("01-ai/Yi-9B-200K",), Geometry(num_layers=48, num_qo_heads=32, num_kv_heads=4, head_dim=128))
TINY = ServedModel(("a model", "its alias"), Geometry(**GEOMETRY))
BUDGETS = [(1000, 6096, 30, 100), (30, 800, 30, 100), (100, 800, 100, 800), (3500, 100, 30, 100)]


@pytest.fixture
def pattern_file(tmp_path: Path) -> str:
    path = tmp_path / "some.json"
    path.write_text(json.dumps(content()))
    return str(path)


def pattern(rank: int = 0, **changes: Any) -> Pattern:
    return Pattern(parse_pattern(json.dumps(content(**changes)), "some.json"), "some.json", rank)


# What "auto" comes to


def test_a_model_with_a_file_has_its_sizes() -> None:
    resolved = resolve(AutoSettings(), YI)
    assert resolved.settings == VerticalSlashSettings(vertical_size=3500, slash_size=4096)
    assert resolved.pattern is not None
    assert resolved.pattern.name == "yi-9b-200k.json"
    assert "vertical_slash with the sizes of the pattern file yi-9b-200k.json (minference==0.1.6.0)" in resolved.why


def test_a_model_without_a_file_has_the_default_method_and_the_log_says_so() -> None:
    resolved = resolve(AutoSettings(), TINY)
    assert resolved == Resolved(BlockSettings(), None, resolved.why)
    assert resolved.why == "no pattern file for a model or its alias: the method is block"


def test_a_named_file_serves_whatever_the_model_is_called(pattern_file: str) -> None:
    resolved = resolve(AutoSettings(pattern_file=pattern_file), TINY)
    assert resolved.settings == VerticalSlashSettings(vertical_size=3500, slash_size=6096)
    assert Path(pattern_file).name in resolved.why


@pytest.mark.parametrize("settings", [BlockSettings(), VerticalSlashSettings(share=0.9)])
def test_another_method_is_what_it_is(settings: Any) -> None:
    assert resolve(settings, None) == Resolved(settings)


def test_a_file_that_does_not_fit_the_model_is_refused_with_both_numbers(pattern_file: str) -> None:
    other = replace(YI, geometry=YI.geometry.model_copy(update={"num_layers": 28, "num_qo_heads": 16}))
    with pytest.raises(ConfigError) as caught:
        resolve(AutoSettings(), other)
    message = str(caught.value)
    assert "yi-9b-200k.json does not fit 01-ai/Yi-9B-200K: it is for num_layers 48, not 28; num_qo_heads 32" in message
    assert message.endswith('Name another file as {"name": "auto", "pattern_file": PATH}, or choose the method block.')
    with pytest.raises(ConfigError, match=r"some.json does not fit .*: it is for num_layers 2, not 48"):
        resolve(AutoSettings(pattern_file=pattern_file), YI)


def test_a_named_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="The pattern file /no/such cannot be read"):
        resolve(AutoSettings(pattern_file="/no/such"), TINY)


def test_without_a_model_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="name block or vertical_slash"):
        resolve(AutoSettings(), None)


@pytest.mark.parametrize("name", shipped.shipped())
def test_every_shipped_file_makes_settings(name: str) -> None:
    file = parse_pattern(shipped.shipped()[name], name)
    settings = file.settings
    assert isinstance(settings, VerticalSlashSettings)
    assert (settings.sink_tokens, settings.local_tokens) == (30, 100)  # MInference's


# The settings


def test_a_pattern_file_is_a_setting_of_auto() -> None:
    assert load(method="auto").method == AutoSettings()
    assert load(method={"name": "auto", "pattern_file": "x.json"}).method.pattern_file == "x.json"
    message = refusal({"minference": {"pattern_file": "x.json"}})
    assert 'write "method": {"name": "auto", "pattern_file": "x.json"}' in message
    message = refusal({"minference": {"method": {"name": "vertical_slash", "pattern_file": "x.json"}}})
    assert "minference.method.pattern_file is not a setting" in message


@pytest.mark.parametrize("value", ["", 7, ["x"], "x" * 5000])
def test_a_pattern_file_is_a_path(value: Any) -> None:
    assert "minference.method.pattern_file=" in refusal(
        {"minference": {"method": {"name": "auto", "pattern_file": value}}}
    )


# What a rank and a layer take


def test_a_rank_takes_its_heads_of_a_layer() -> None:
    assert pattern().budgets(0, 4) == BUDGETS
    assert [pattern(rank).budgets(0, 2) for rank in (0, 1)] == [BUDGETS[:2], BUDGETS[2:]]
    assert [pattern(rank).budgets(0, 1) for rank in range(4)] == [[budget] for budget in BUDGETS]


def test_a_stage_takes_its_layers_by_their_number_in_the_whole_model() -> None:
    both = pattern(layers=[HEADS, HEADS[::-1]])
    assert both.budgets(1, 4) == BUDGETS[::-1]


@pytest.mark.parametrize(
    ("layer", "heads", "rank", "said"),
    [
        (2, 4, 0, "Layer 2 is none of the 2 of some.json"),
        (-1, 4, 0, "Layer -1 is none of the 2"),
        (None, 4, 0, "A layer whose name holds no single number is none of the 2"),
        (0, 3, 0, "Layer 0 has 3 query heads on tensor-parallel rank 0, which are no share of the 4 in some.json"),
        (0, 2, 2, "Layer 0 has 2 query heads on tensor-parallel rank 2, which are no share of the 4"),
        (1, 4, 0, "Layer 1 is dense in some.json"),
    ],
)
def test_what_the_file_has_not_is_refused(layer: int | None, heads: int, rank: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        pattern(rank).budgets(layer, heads)


# In a worker


def make_runtime(pattern_file: str | None, model: ServedModel = TINY, **settings: Any) -> runtime.Runtime:
    method = {"name": "auto", "pattern_file": pattern_file}
    config = MInferenceConfig.model_validate({"log_every": 0.0, "method": method, **settings})
    return runtime.Runtime(config, CPU, publish=True, model=model)


def test_each_layer_has_the_budgets_of_its_heads(pattern_file: str) -> None:
    for rank in (0, 1):
        worker = make_runtime(pattern_file, replace(TINY, rank=rank))
        shape = ScratchShape(2, 1, 64, torch.bfloat16, max_seq_len=8192, max_chunk=256)
        state = worker.layer_state(shape, position=5, num_layers=9, index=0)
        assert isinstance(worker.method, VerticalSlash)
        assert [tuple(row) for row in state.budgets.tolist()] == BUDGETS[2 * rank : 2 * rank + 2]
        assert state.budgets.dtype == torch.int32
        # The list of columns has room for the head that keeps most, on whichever rank.
        assert state.buffers.index.columns.shape[1] == 3500
        with pytest.raises(ConfigError, match="Layer 7 is none"):
            worker.layer_state(shape, position=6, num_layers=9, index=7)


@pytest.mark.parametrize(("dense_layers", "expected"), [(0, {1}), (1, {0, 1})])
def test_layers_run_dense_by_the_file_or_by_the_setting(
    pattern_file: str, dense_layers: int, expected: set[int]
) -> None:
    assert make_runtime(pattern_file, dense_layers=dense_layers).dense_layers == expected


def test_without_a_file_the_worker_runs_block(log_lines: list[tuple[str, str]]) -> None:
    worker = make_runtime(None)
    assert isinstance(worker.method, Block)
    assert worker.dense_layers == frozenset()
    assert ("INFO", "MInference: no pattern file for a model or its alias: the method is block.") in log_lines


def test_metrics_name_the_method_that_auto_comes_to(pattern_file: str) -> None:
    for file, method in ((pattern_file, "vertical_slash"), (None, "block")):
        assert list(make_runtime(file).counters.snapshot().engines) == [(method, "reference")]


def test_the_served_model_is_read_from_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel_state = pytest.importorskip("vllm.distributed.parallel_state")
    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: SimpleNamespace(rank_in_group=3))
    from minference_vllm import compat

    arch = SimpleNamespace(total_num_hidden_layers=2, total_num_attention_heads=4, total_num_kv_heads=2, head_size=64)
    for aliases, names in ((None, ()), ("x", ("x",)), (["x", "y"], ("x", "y"))):
        model = SimpleNamespace(model="org/model", served_model_name=aliases, model_arch_config=arch)
        served = compat.served_model(SimpleNamespace(model_config=model))
        assert served == ServedModel(("org/model", *names), Geometry(**GEOMETRY), rank=3)


def test_largest_sizes_are_within_what_settings_allow() -> None:
    most = pattern(layers=[[[MAX_TOKENS, MAX_TOKENS]] * 4, "dense"]).file.settings
    assert (most.vertical_size, most.slash_size) == (MAX_TOKENS, MAX_TOKENS)
