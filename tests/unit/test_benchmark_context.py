# SPDX-License-Identifier: Apache-2.0
"""benchmarks.context stretches a model's positions as vLLM and Transformers understand it."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import context
from tests.conftest import import_or_skip

QWEN = {"max_position_embeddings": 32768, "rope_theta": 1e6}


def model(folder: Path, config: dict[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_without_a_context_nothing_is_stretched(tmp_path: Path) -> None:
    assert context.stretched(model(tmp_path, QWEN), None) == {}


@pytest.mark.parametrize("config", [QWEN, {"max_position_embeddings": 32768, "rope_parameters": {"rope_theta": 1e6}}])
def test_the_factor_is_that_of_the_positions(tmp_path: Path, config: dict[str, Any]) -> None:
    overrides = context.stretched(model(tmp_path, config), 131_072)["hf_overrides"]
    assert overrides["max_position_embeddings"] == 131_072
    assert overrides["rope_parameters"] == {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768
    }  # fmt: skip


@pytest.mark.parametrize("tokens", [0, 32768])
def test_a_context_that_the_model_has_is_refused(tmp_path: Path, tokens: int) -> None:
    with pytest.raises(SystemExit, match="32768 tokens without"):
        context.stretched(model(tmp_path, QWEN), tokens)


def test_transformers_takes_the_parameters(tmp_path: Path) -> None:
    transformers = import_or_skip("transformers")
    overrides = context.stretched(model(tmp_path, QWEN), 131_072)["hf_overrides"]
    config = transformers.Qwen2Config(**overrides, num_hidden_layers=1, hidden_size=64, num_attention_heads=1)
    frequencies, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    assert len(frequencies) == 32
    assert factor == pytest.approx(1.1386, abs=1e-4)  # 0.1 ln 4 + 1, as in the paper
