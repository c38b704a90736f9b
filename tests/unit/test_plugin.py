# SPDX-License-Identifier: Apache-2.0
"""Registration, in the vLLM that is installed: what `--attention-backend minference` means in each of its processes."""

import importlib.metadata
import inspect
import multiprocessing
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minference_vllm import compat, plugin
from minference_vllm.metrics import exporter
from tests.conftest import import_or_skip

registry = import_or_skip("vllm.v1.attention.backends.registry")
platforms = import_or_skip("vllm.platforms")
VllmConfig = import_or_skip("vllm.config").VllmConfig
OF_PLATFORM = [(type(platforms.current_platform), n) for n in ("get_attn_backend_cls", "update_block_size_for_backend")]
SEED = import_or_skip("vllm.v1.core.kv_cache_utils"), "resolve_none_hash_seed"
EXECUTOR = import_or_skip("vllm.v1.executor.abstract").Executor, "__init__"
WRAPPED = (*OF_PLATFORM, (VllmConfig, "try_verify_and_update_config"), EXECUTOR, SEED)
ON_CPU = platforms.current_platform.is_cpu()
OUR_PATH = plugin.CPU_BACKEND if ON_CPU else plugin.GPU_BACKEND
CUSTOM = registry.AttentionBackendEnum.CUSTOM

cpu_only = pytest.mark.skipif(not ON_CPU, reason="vLLM runs on a GPU here")


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process in which no plugin has been loaded; afterwards as it was."""
    for owner, name in WRAPPED:
        monkeypatch.setattr(owner, name, inspect.getattr_static(owner, name))
    monkeypatch.setattr(exporter, "install", lambda: None)
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    monkeypatch.delitem(registry.AttentionBackendEnum._member_map_, plugin.NAME, raising=False)
    compat.warn_if_untested.cache_clear()
    yield
    registry.AttentionBackendEnum._member_map_.pop(plugin.NAME, None)
    compat.warn_if_untested.cache_clear()


def selector_config(**changes: Any) -> Any:
    import torch
    from vllm.v1.attention.selector import AttentionSelectorConfig

    plain = {"head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 128}
    return AttentionSelectorConfig(**{**plain, **changes})


def test_the_entry_point_is_the_function_tested_here() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["minference"].partition(":")
    assert getattr(importlib.import_module(module), function) is plugin.register


@pytest.mark.parametrize(
    ("before", "after"), [("", "MINFERENCE_"), ("A_,MINFERENCE_", "A_,MINFERENCE_"), ("A_", "A_,MINFERENCE_")]
)
def test_rays_workers_get_our_environment_variables(before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugin.RAY_PREFIXES, before)
    monkeypatch.setenv("MINFERENCE_CONFIG", "settings.json")
    plugin.register()
    assert os.environ[plugin.RAY_PREFIXES] == after
    assert "MINFERENCE_CONFIG" in import_or_skip("vllm.ray.ray_env").get_env_vars_to_copy()


def test_the_name_resolves_to_our_backend(log_lines: list[tuple[str, str]]) -> None:
    plugin.register()
    backend = registry.AttentionBackendEnum["MINFERENCE"]
    assert backend is CUSTOM
    assert backend.get_path() == OUR_PATH
    assert log_lines == []


def test_the_command_line_takes_the_name_in_any_case() -> None:
    from vllm.config import AttentionConfig

    plugin.register()
    assert AttentionConfig(backend="minference").backend is CUSTOM
    assert AttentionConfig(backend="MInference").backend is CUSTOM


def test_the_backend_is_loadable_and_its_name_is_known_to_vllm() -> None:
    plugin.register()
    backend = registry.AttentionBackendEnum["MINFERENCE"].get_class()
    assert f"{backend.__module__}.{backend.__qualname__}" == OUR_PATH
    # vLLM's attention layers look their backend up by this name.
    assert registry.AttentionBackendEnum[backend.get_name()] is CUSTOM


def test_registering_loads_nothing_heavy() -> None:
    # What vLLM itself has loaded by then does not count.
    code = (
        "import sys, vllm.platforms, vllm.v1.attention.backends.registry; before = set(sys.modules);"
        "from minference_vllm.plugin import register; register(); sys.stdout.write(' '.join(set(sys.modules) - before))"
    )
    environ = {**os.environ, "VLLM_PLUGINS": ""}
    loaded = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    names = set(loaded.stdout.split())
    assert "minference_vllm.plugin" in names
    heavy = ("backend", "cpu", "engine", "impl", "kernels", "metadata", "reference", "runtime")  # they import PyTorch
    assert not names & {"torch", "triton", *(f"minference_vllm.{name}" for name in heavy)}


def test_registering_twice_is_registering_once(log_lines: list[tuple[str, str]]) -> None:
    plugin.register()
    wrapped = wrapped_methods()
    plugin.register()
    assert registry.AttentionBackendEnum["MINFERENCE"].get_path() == OUR_PATH
    assert wrapped_methods() == wrapped
    assert log_lines == []


def wrapped_methods() -> tuple[Any, ...]:
    platform = platforms.current_platform
    return (
        platform.get_attn_backend_cls,
        platform.update_block_size_for_backend,
        VllmConfig.try_verify_and_update_config,
    )


def test_a_worker_reports_a_model_without_a_layer_of_ours() -> None:
    plugin.register()
    assert platforms.current_platform.update_block_size_for_backend.reports_models_without_our_layers


def test_models_take_us_for_flash_attention_where_we_are_one() -> None:
    plugin.register()
    takes = getattr(VllmConfig.try_verify_and_update_config, "passes_ours_for_flash_attention", False)
    assert takes is not ON_CPU


def name_and_path(backend: Any) -> tuple[str, bool, str]:
    """In a worker: what arrived, whether our plugin had been loaded by then, and what it means once it is."""
    loaded = backend.is_overridden()
    plugin.register()
    return backend.name, loaded, backend.get_path()


def test_the_backend_travels_to_a_spawned_process_that_has_not_loaded_the_plugin() -> None:
    plugin.register()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        arrived = pool.apply(name_and_path, (registry.AttentionBackendEnum["MINFERENCE"],))
    assert arrived == ("CUSTOM", False, OUR_PATH)


def test_a_vllm_without_our_interfaces_goes_on_without_us(
    monkeypatch: pytest.MonkeyPatch, log_lines: list[tuple[str, str]]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm.v1.attention.backends.registry", None)
    plugin.register()
    ((level, line),) = log_lines
    assert level == "ERROR"
    assert "--attention-backend minference will not be available" in line


def test_an_error_while_registering_goes_no_further(
    monkeypatch: pytest.MonkeyPatch, log_lines: list[tuple[str, str]]
) -> None:
    def refuse(*_: Any) -> None:
        raise TypeError("another signature")

    monkeypatch.setattr(registry, "register_backend", refuse)
    plugin.register()
    assert [level for level, _ in log_lines] == ["ERROR"]


@pytest.mark.parametrize(
    ("broken", "consequence"),
    [
        ("importlib.metadata.version", "cannot tell whether it was tested"),
        ("minference_vllm.compat.pass_for_flash_attention", "Gemma 4"),
        ("minference_vllm.compat.report_models_without_our_layers", "will not say so"),
        ("minference_vllm.compat.pages.salt_block_hashes", "page_salt can only be off"),
        ("minference_vllm.metrics.exporter.install", "/metrics lacks its metrics"),
    ],
)
def test_what_fails_after_registration_costs_that_alone(
    broken: str, consequence: str, monkeypatch: pytest.MonkeyPatch, log_lines: list[tuple[str, str]]
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(broken, refuse)
    monkeypatch.setattr(platforms.current_platform, "is_cpu", lambda: False)
    plugin.register()
    ((level, line),) = log_lines
    assert level == "WARNING"
    assert line.startswith("MInference is registered, but ")
    assert consequence in line
    assert "no space left" in line
    assert "not be available" not in line
    assert registry.AttentionBackendEnum["MINFERENCE"].get_path() == plugin.GPU_BACKEND


def test_every_step_after_registration_is_tried(
    monkeypatch: pytest.MonkeyPatch, log_lines: list[tuple[str, str]]
) -> None:
    def refuse() -> None:
        raise ImportError("moved")

    monkeypatch.setattr(plugin, "STEPS", tuple((refuse, f"step {number}") for number in range(3)))
    plugin.register()
    assert [line for _, line in log_lines] == [
        f"MInference is registered, but step {number}: ImportError('moved')" for number in range(3)
    ]


def test_another_plugin_on_custom_is_reported_by_its_path(log_lines: list[tuple[str, str]]) -> None:
    registry.register_backend(CUSTOM, "another_plugin.Backend")
    plugin.register()
    ((level, line),) = log_lines
    assert level == "WARNING"
    assert "another_plugin.Backend" in line
    assert "VLLM_PLUGINS" in line
    assert CUSTOM.get_path() == OUR_PATH


def test_a_plugin_that_takes_custom_after_us_does_not_get_what_is_selected(log_lines: list[tuple[str, str]]) -> None:
    plugin.register()
    registry.register_backend(CUSTOM, "another_plugin.Backend")
    of = platforms.current_platform.get_attn_backend_cls
    of(None, attn_selector_config=selector_config(), num_heads=9)
    assert CUSTOM.get_path() == "another_plugin.Backend"
    for _ in range(2):
        assert of(CUSTOM, attn_selector_config=selector_config(), num_heads=9) == OUR_PATH
    ((level, line),) = log_lines
    assert level == "WARNING"
    assert "another_plugin.Backend" in line


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.33.0", "0.33.1rc2.dev3+g0123abc"])
def test_tested_versions_of_vllm_are_served_silently(
    version: str, monkeypatch: pytest.MonkeyPatch, log_lines: list[tuple[str, str]]
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    plugin.register()
    assert log_lines == []


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "0.1.dev1+g0123abc", "nightly"])
def test_an_untested_version_of_vllm_is_named_in_one_warning_and_served(
    version: str, monkeypatch: pytest.MonkeyPatch, log_lines: list[tuple[str, str]]
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    plugin.register()
    plugin.register()
    ((level, line),) = log_lines
    assert level == "WARNING"
    assert version in line
    assert "0.32 and 0.33" in line
    assert registry.AttentionBackendEnum["MINFERENCE"].get_path() == OUR_PATH


def test_a_vllm_that_is_not_an_installed_distribution_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    # A source tree on PYTHONPATH, or a build under another distribution's name.
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    plugin.register()
    assert registry.AttentionBackendEnum["MINFERENCE"].get_path() == OUR_PATH


@cpu_only
def test_the_cpu_platform_gives_our_class_when_it_is_selected() -> None:
    plugin.register()
    chosen = platforms.current_platform.get_attn_backend_cls(
        registry.AttentionBackendEnum["MINFERENCE"], attn_selector_config=selector_config(), num_heads=9
    )
    assert chosen == plugin.CPU_BACKEND
    assert platforms.current_platform.get_attn_backend_cls(CUSTOM, selector_config()) == plugin.CPU_BACKEND


@cpu_only
@pytest.mark.parametrize("name", [None, "CPU_ATTN", "FLASH_ATTN"])
def test_the_cpu_platform_gives_the_stock_class_otherwise(name: str | None) -> None:
    backend = registry.AttentionBackendEnum[name] if name else None
    stock = platforms.current_platform.get_attn_backend_cls(backend, attn_selector_config=selector_config())
    plugin.register()
    assert platforms.current_platform.get_attn_backend_cls(backend, attn_selector_config=selector_config()) == stock
    assert stock == registry.AttentionBackendEnum.CPU_ATTN.get_path()


@cpu_only
def test_a_model_with_latent_attention_keeps_the_stock_class_on_a_cpu() -> None:
    mla = selector_config(use_mla=True)
    stock = platforms.current_platform.get_attn_backend_cls(CUSTOM, attn_selector_config=mla)
    plugin.register()
    assert platforms.current_platform.get_attn_backend_cls(CUSTOM, attn_selector_config=mla) == stock
