# SPDX-License-Identifier: Apache-2.0
"""What we ask of vLLM beyond a backend's interface, in the vLLM that is installed. The contract tests run it too."""

import functools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from minference_vllm import compat
from minference_vllm.pipeline import ONE_STAGE
from tests.conftest import import_or_skip

vllm_config_module = import_or_skip("vllm.config")
registry = import_or_skip("vllm.v1.attention.backends.registry")
attention = import_or_skip("vllm.model_executor.layers.attention")
base = import_or_skip("vllm.model_executor.layers.attention_layer_base")
mamba = import_or_skip("vllm.model_executor.layers.mamba.abstract")
deepseek = import_or_skip("vllm.model_executor.models.deepseek_v2")
backends = import_or_skip("vllm.compilation.backends")

VllmConfig = vllm_config_module.VllmConfig
Backend = registry.AttentionBackendEnum
OURS = Backend.CUSTOM
LAYERS = 4
NAME = "model.layers.{}.self_attn.attn"


# Models that ask for FLASH_ATTN by name.


@pytest.fixture
def flash_attention_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.v1.attention.backends.fa_utils.is_fa_version_supported", lambda _: True)


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VllmConfig, "try_verify_and_update_config", VllmConfig.try_verify_and_update_config)
    compat.pass_for_flash_attention(OURS, Backend.FLASH_ATTN)


class Architecture(list):
    """The layers' shapes, as vLLM's model_arch_config gives them."""

    total_num_hidden_layers = LAYERS


def configured(architecture: str, backend: Any) -> Any:
    """What a model's settings make of a configuration in which this backend is selected."""
    text = SimpleNamespace(layer_types=["sliding_attention", "full_attention"] * 2)
    config = SimpleNamespace(
        attention_config=vllm_config_module.AttentionConfig(backend=backend),
        cache_config=SimpleNamespace(cache_dtype="auto", enable_prefix_caching=True),
        model_config=SimpleNamespace(
            architecture=architecture,
            convert_type="none",
            hf_text_config=text,
            is_hybrid=False,
            model_arch_config=Architecture(SimpleNamespace(head_size=size) for size in (256, 512) * 2),
            multimodal_config=None,
        ),
    )
    VllmConfig.try_verify_and_update_config(config)
    return config.attention_config


@pytest.mark.usefixtures("flash_attention_4", "passing")
@pytest.mark.parametrize(
    "architecture", ["Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "UnlimitedOCRForCausalLM"]
)
def test_models_that_want_flash_attention_by_name_take_us_for_it(architecture: str) -> None:
    ours, stock = configured(architecture, OURS), configured(architecture, Backend.FLASH_ATTN)
    assert ours.flash_attn_version == stock.flash_attn_version == 4
    assert (ours.backend, stock.backend) == (OURS, Backend.FLASH_ATTN)


@pytest.mark.usefixtures("flash_attention_4", "passing")
@pytest.mark.parametrize("backend", [None, Backend.TRITON_ATTN, Backend.FLASHINFER], ids=str)
def test_other_backends_are_what_they_are(backend: Any) -> None:
    settled = configured("Gemma4ForCausalLM", backend)
    assert settled.backend is backend
    assert settled.flash_attn_version == (4 if backend is None else None)


@pytest.mark.usefixtures("passing")
def test_a_model_that_cannot_be_served_is_refused_and_the_selection_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.v1.attention.backends.fa_utils.is_fa_version_supported", lambda _: False)
    made: list[Any] = []
    stock = vllm_config_module.AttentionConfig
    monkeypatch.setattr(
        vllm_config_module, "AttentionConfig", lambda **fields: made.append(stock(**fields)) or made[-1]
    )
    with pytest.raises(RuntimeError, match="requires FA4"):
        configured("UnlimitedOCRForCausalLM", OURS)
    assert made[0].backend is OURS


@pytest.mark.usefixtures("passing")
def test_passing_for_flash_attention_twice_changes_nothing_more() -> None:
    once = VllmConfig.try_verify_and_update_config
    compat.pass_for_flash_attention(OURS, Backend.FLASH_ATTN)
    assert VllmConfig.try_verify_and_update_config is once


# Which layers are the model's, and which of them ours.


def layer(kind: type = attention.Attention, backend: str = "FlashAttentionDiffKVBackend", **attributes: Any) -> Any:
    """A layer of vLLM's without its weights; an attention layer has an implementation, no one's if none is given."""
    if kind is attention.Attention:
        attributes = {"impl": object(), "attn_type": "decoder", **attributes}
    kind = type(kind.__name__, (kind,), {"get_attn_backend": lambda self: type(backend, (), {})})
    kind.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    made = kind.__new__(kind)
    made.__dict__.update(attributes)
    return made


@functools.cache
def our_implementation() -> Any:
    from minference_vllm.impl import SparseLayerMixin

    return type("DerivedByVllm", (SparseLayerMixin,), {})()


def our_layer(**attributes: Any) -> Any:
    return layer(impl=our_implementation(), **attributes)


class Config(SimpleNamespace):
    """Stands for vLLM's, to which there can be weak references."""


DRAFTS = SimpleNamespace(method="draft_model")


def model(layers: dict[str, Any], selected: Any = OURS, speculation: Any = None, **changes: Any) -> Any:
    """The parts of a VllmConfig that tell of a model's layers."""
    return Config(
        attention_config=vllm_config_module.AttentionConfig(backend=selected, **changes),
        compilation_config=SimpleNamespace(static_forward_context=layers),
        model_config=SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=LAYERS)),
        speculative_config=speculation,
    )


def test_layers_are_ours_and_decoders_in_the_order_in_which_they_run() -> None:
    named = {
        "b": layer(),
        "moe": object(),
        "c": our_layer(attn_type="encoder_only"),
        "encoder": layer(attn_type="encoder_only"),
        "cross": layer(attn_type="encoder_decoder"),
        "mamba": layer(mamba.MambaBase, num_heads=8),
        "index": layer(deepseek.DeepseekV32IndexerCache, head_dim=128),
        "a": layer(base.AttentionLayerBase, num_heads=8),  # InklingAttention: no implementation apart
        "latent": layer(attention.MLAAttention, impl=object(), num_heads=8),
        "d": our_layer(),
    }
    assert list(compat.attention_layers(model(named))) == ["b", "c", "a", "latent", "d"]
    assert list(compat.foreign_layers(model(named))) == ["b", "a", "latent"]


def test_foreign_layers_come_with_their_backend_and_without_drafters() -> None:
    named = {NAME.format(0): our_layer(), NAME.format(1): layer(), NAME.format(LAYERS): layer()}
    assert compat.foreign_layers(model(named, speculation=DRAFTS)) == {NAME.format(1): "FlashAttentionDiffKVBackend"}


class Platform:
    """A platform of vLLM's, for the one hook that runs when a worker has its layers."""

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: Any) -> str:
        return "settled"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(compat, "reports_metrics", lambda: True)
    monkeypatch.setattr(compat, "pipeline", lambda vllm_config: ONE_STAGE)
    platform = type("TestPlatform", (Platform,), {})
    for _ in range(2):  # as in a process that loads plugins twice
        compat.report_models_without_our_layers(platform, OURS)
    return platform.update_block_size_for_backend  # type: ignore[attr-defined]


def test_a_model_without_a_layer_of_ours_is_reported_once(load: Any, log_lines: list[tuple[str, str]]) -> None:
    layers = {NAME.format(i): layer() for i in range(3)}
    layers[NAME.format(3)] = layer(backend="TritonAttentionDiffKVBackend")
    assert load(model(layers)) == "settled"
    assert [line for _, line in log_lines] == [
        "MInference: none of the model's 4 attention layers is ours (they choose their own backend: "
        "FlashAttentionDiffKVBackend, TritonAttentionDiffKVBackend); everything runs as without the plugin."
    ]


def test_so_is_one_for_whose_full_attention_we_are_selected(load: Any, log_lines: list[tuple[str, str]]) -> None:
    load(model({NAME.format(0): layer()}, selected=None, backend_per_kind={"full_attention": OURS}))
    assert len(log_lines) == 1


def test_a_drafters_layers_of_ours_do_not_count(load: Any, log_lines: list[tuple[str, str]]) -> None:
    load(model({NAME.format(0): layer(), NAME.format(LAYERS): our_layer()}, speculation=DRAFTS))
    assert len(log_lines) == 1


def test_a_model_of_states_alone_is_reported(load: Any, log_lines: list[tuple[str, str]]) -> None:
    load(model({"mamba": layer(mamba.MambaBase)}))
    assert [line for _, line in log_lines] == [
        "MInference: the model has no attention layers that could be ours; everything runs as without the plugin."
    ]


def test_nothing_is_said_of_other_models_and_by_other_ranks(
    load: Any, log_lines: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = {NAME.format(0): layer()}
    load(model({**foreign, NAME.format(1): our_layer()}))
    load(model(foreign, selected=None))
    load(model(foreign, selected=Backend.FLASH_ATTN))
    monkeypatch.setattr(compat, "reports_metrics", lambda: False)
    load(model(foreign))
    assert log_lines == []


def test_a_report_that_fails_harms_no_worker(
    load: Any, log_lines: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "attention_layers", None)
    assert load(model({})) == "settled"
    assert len(log_lines) == 1


# Draft models.


@pytest.mark.parametrize(
    ("tag", "is_drafter"),
    [
        (None, False),
        ("draft_model", True),
        ("eagle_head", True),
        ("dflash_head", True),
        ("extract_hidden_states", True),
        ("self_decoder", False),  # a part of Gemma 4's own
    ],
)
def test_the_part_that_vllm_is_loading_tells_a_drafters_layers(tag: str | None, is_drafter: bool) -> None:
    with backends.set_model_tag(tag) if tag else nullcontext():
        assert compat.is_loading_drafter() is is_drafter
    assert not compat.is_loading_drafter()


@pytest.mark.parametrize(
    ("name", "attributes", "is_draft"),
    [
        (NAME.format(LAYERS - 1), {}, False),
        (NAME.format(LAYERS), {}, True),  # EAGLE, most MTP
        (NAME.format(1), {"is_draft_layer": True}, True),
        (NAME.format(1), {"impl": SimpleNamespace(is_of_drafter=True)}, True),
        ("draft_model.model.layers.1.self_attn.attn", {}, True),
        ("mtp.layers.0.self_attn.attn", {}, True),
        ("model.mtp.layers.0.self_attn.attn", {}, True),
    ],
)
def test_drafters_layers_are_told_by_flag_or_name(name: str, attributes: dict[str, Any], is_draft: bool) -> None:
    config = model({NAME.format(0): our_layer(), name: layer(**attributes)}, speculation=DRAFTS)
    assert compat.is_draft_layer(name, config.compilation_config.static_forward_context[name], config) is is_draft


@pytest.mark.parametrize("name", ["model.decoder.layers.0.self_attn.attn", NAME.format(LAYERS)], ids=["", "a loop"])
def test_names_and_numbers_tell_no_drafters_where_there_is_none(name: str) -> None:
    config = model({NAME.format(0): our_layer(), name: layer()})
    assert not compat.is_draft_layer(name, config.compilation_config.static_forward_context[name], config)
