# SPDX-License-Identifier: Apache-2.0
"""Which layers share a runtime: those of one engine. Run by test_vllm_033.py, with that release on the path."""

import gc
import weakref
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from vllm.config import DeviceConfig, VllmConfig

from minference_vllm import compat
from minference_vllm import impl as impl_module
from minference_vllm.impl import MInferenceImpl
from minference_vllm.metrics.counters import Counters
from minference_vllm.patterns import Geometry, ServedModel
from minference_vllm.pipeline import ONE_STAGE
from minference_vllm.runtime import Runtime
from tests.contract.fakes import (
    CPU,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    NAME,
    SHORT,
    counted,
    make_builder,
    make_common,
    make_config,
)

GATE = {"min_seq_len": 200, "min_chunk": 100, "log_every": 0}


@pytest.fixture(autouse=True)
def worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process counts as rank 0, starts no threads, and uses the CPU as its GPU."""
    monkeypatch.setattr(compat, "reports_metrics", lambda: True)
    monkeypatch.setattr(compat, "pipeline", lambda vllm_config: ONE_STAGE)
    monkeypatch.setattr(Counters, "start", Mock())
    find = impl_module.runtime_of
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(impl_module, "runtime_of", lambda config, _: find(config, CPU))


def make_engine_config(**settings: Any) -> Any:
    config = make_config()
    config.additional_config = {"minference": {**GATE, **settings}}
    return config


def make_layer(config: Any, **changes: Any) -> MInferenceImpl:
    """A layer that finds its runtime by itself."""
    plain = {"alibi_slopes": None, "sliding_window": None, "kv_cache_dtype": "auto"}
    with patch.object(impl_module, "get_current_vllm_config", lambda: config):
        return MInferenceImpl(HEADS, HEAD_DIM, 1.0, KV_HEADS, **{**plain, **changes})


def test_two_engines_of_the_same_settings_count_apart() -> None:
    configs = [make_engine_config() for _ in range(2)]
    layers = [make_layer(configs[0]), make_layer(configs[1], sliding_window=64)]
    builders = [make_builder({NAME.format(0): layer}, config) for layer, config in zip(layers, configs, strict=True)]
    one, other = (layer.runtime for layer in layers)
    assert one is not other
    assert (one.has_sparse_layers, other.has_sparse_layers) == (True, False)
    for builder in builders:
        builder.build(0, make_common(SHORT))
    assert counted(one) == {("dense", "below_min_seq_len"): SHORT.rows}
    assert counted(other) == {("dense", "sliding_window"): SHORT.rows}


def test_an_engine_has_one_runtime_for_the_same_settings() -> None:
    config = make_engine_config()
    runtime = impl_module.runtime_of(config, CPU)
    assert impl_module.runtime_of(config, CPU) is runtime
    config.additional_config["minference"]["min_chunk"] = 7
    assert impl_module.runtime_of(config, CPU) is not runtime


def test_a_draft_model_is_the_main_models_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = Geometry(num_layers=48, num_qo_heads=32, num_kv_heads=4, head_dim=128)
    monkeypatch.setattr(compat, "served_model", lambda config: ServedModel((config.name,), geometry))
    layers = SimpleNamespace(static_forward_context={})

    def runtime_of(name: str, compilation_config: Any) -> Runtime:
        config = {"minference": {"method": "auto", "log_every": 0}}
        return impl_module.runtime_of(
            SimpleNamespace(name=name, additional_config=config, compilation_config=compilation_config), CPU
        )

    yi = runtime_of("Yi-9B-200K", layers)
    assert yi.resolved.pattern is not None
    assert runtime_of("a draft model", layers) is yi
    other = runtime_of("another", SimpleNamespace(static_forward_context={}))
    assert other.resolved.pattern is None


def test_a_runtime_and_its_scratch_go_with_their_engine() -> None:
    config = make_engine_config()
    layer = make_layer(config)
    make_builder({NAME.format(0): layer}, config)
    runtime, counters = weakref.ref(layer.runtime), layer.runtime.counters  # the publishing thread holds these
    scratch = weakref.ref(layer.layer_state.attend.lse)
    del layer, config
    gc.collect()
    assert runtime() is None
    assert scratch() is None
    assert counters.snapshot().scratch_bytes > 0


def test_configurations_of_parts_of_an_engine_are_that_engines_but_by_their_instance_id() -> None:
    # vLLM makes such configurations from the fields of the engine's own, with other models.
    engine, other = (VllmConfig(device_config=DeviceConfig(device="cpu")) for _ in range(2))
    part = VllmConfig(device_config=engine.device_config, compilation_config=engine.compilation_config)
    assert part.instance_id != engine.instance_id
    assert compat.engine_id(part) == compat.engine_id(engine) != compat.engine_id(other)
