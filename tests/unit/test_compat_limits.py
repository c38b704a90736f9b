# SPDX-License-Identifier: Apache-2.0
"""What is read of a server's configuration: its limits, and which engine a configuration belongs to."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minference_vllm import compat
from minference_vllm.budget import Budget
from minference_vllm.compat import engines, limits
from tests.conftest import import_or_skip


def configuration(slots: int | None = None, **scheduler: Any) -> Any:
    speculation = None if slots is None else SimpleNamespace(max_num_new_slots_for_drafting=slots)
    limits = SimpleNamespace(max_num_batched_tokens=8192, **scheduler)
    return SimpleNamespace(scheduler_config=limits, speculative_config=speculation)


@pytest.mark.parametrize(
    ("scheduler", "budget"),
    [
        ({}, Budget(8192, 8192)),
        ({"long_prefill_token_threshold": 0}, Budget(8192, 8192)),
        ({"long_prefill_token_threshold": 2048}, Budget(8192, 2048)),
        ({"long_prefill_token_threshold": 9999}, Budget(8192, 8192)),
        ({"long_prefill_token_threshold": 2048, "long_prefill_token_threshold_adaptive": True}, Budget(8192, 4096)),
        ({"long_prefill_token_threshold": 6000, "long_prefill_token_threshold_adaptive": True}, Budget(8192, 6000)),
        ({"long_prefill_token_threshold": 0, "long_prefill_token_threshold_adaptive": True}, Budget(8192, 8192)),
        ({"slots": 0, "max_num_scheduled_tokens": 8192}, Budget(8192, 8192)),
        ({"slots": 1, "max_num_scheduled_tokens": 8192}, Budget(8192, 8192, slots=1)),
        ({"max_num_scheduled_tokens": 4096}, Budget(8192, 8192, scheduled=4096)),
        ({"max_num_scheduled_tokens": None}, Budget(8192, 8192)),
    ],
)
def test_the_budget_is_the_schedulers(scheduler: dict[str, Any], budget: Budget) -> None:
    assert limits.budget(configuration(**scheduler)) == budget


@pytest.mark.parametrize(("mode", "grain"), [("align", 544), ("none", 1), ("all", 1)])
def test_where_vllm_caches_states_at_blocks_it_cuts_prompts_there(mode: str, grain: int) -> None:
    config = configuration()
    config.cache_config = SimpleNamespace(mamba_cache_mode=mode, block_size=544)
    assert limits.budget(config).grain == grain


def test_the_limits_are_vllms() -> None:
    """Where an attribute is missing the budget is taken to be the whole step, and the prompt's end is not seen."""
    config = import_or_skip("vllm.config")
    assert isinstance(config.SpeculativeConfig.max_num_new_slots_for_drafting, property)
    names = {field.name for field in dataclasses.fields(config.SchedulerConfig)}
    assert names >= {"max_num_batched_tokens", "max_num_scheduled_tokens", "long_prefill_token_threshold"}
    assert {field.name for field in dataclasses.fields(config.CacheConfig)} >= {"mamba_cache_mode", "block_size"}


@pytest.mark.parametrize(("runner", "longest"), [("generate", 511), ("pooling", 512)])
def test_a_prompt_leaves_room_for_an_answer_if_there_is_one(runner: str, longest: int) -> None:
    model = SimpleNamespace(max_model_len=512, runner_type=runner)
    assert limits.longest_prompt(SimpleNamespace(model_config=model)) == longest


def test_vllms_configurations_for_parts_of_an_engine_are_that_engines(tmp_path: Path) -> None:
    replace = import_or_skip("vllm.config").replace
    shape = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 64}
    text = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 100, "dtype": "bfloat16", **shape}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **text}))
    engine, other = (engines.engine_config(str(tmp_path), skip_tokenizer_init=True) for _ in range(2))
    parts = [engine.with_hf_config(engine.model_config.hf_config), replace(engine, quant_config=None)]
    assert engine.instance_id not in {part.instance_id for part in parts}
    assert {compat.engine_id(part) for part in parts} == {compat.engine_id(engine)}
    assert compat.engine_id(other) != compat.engine_id(engine)
