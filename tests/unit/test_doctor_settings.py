# SPDX-License-Identifier: Apache-2.0
"""What the doctor says of settings, of a server's limits and of a model's layers."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minference_vllm.budget import Budget
from minference_vllm.compat import engines
from minference_vllm.config import CONFIG_FILE_VARIABLE, MInferenceConfig
from minference_vllm.doctor import settings as doctors_settings
from minference_vllm.doctor.check import Check, Status
from minference_vllm.doctor.model import NONE, OTHER, SPARSE, describe_layers
from minference_vllm.doctor.settings import Limits, check_settings
from minference_vllm.reason import Reason
from tests.conftest import import_or_skip

CPU = torch.device("cpu")
LONG = Limits(max_num_batched_tokens=8192, max_model_len=65_536)
TEXT = dict(model_type="llama", num_hidden_layers=4)


def check(tmp_path: Path, settings: object = None, limits: Limits = LONG, model: str | None = None) -> dict[str, Check]:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(settings or {}))
    return {check.name: check for check in check_settings({CONFIG_FILE_VARIABLE: str(path)}, model, limits, CPU)}


def test_settings_are_shown_as_a_server_resolves_them(tmp_path: Path) -> None:
    checks = check(tmp_path, {"min_chunk": 512, "method": "vertical_slash"})
    assert checks["settings"].facts["settings"]["min_chunk"] == 512
    assert checks["settings"].facts["settings"]["method"]["name"] == "vertical_slash"
    assert str(tmp_path / "settings.json") in checks["settings"].what
    assert checks["kernel"].what.endswith("is reference here")
    json.dumps(dict(checks["settings"].facts))


def test_settings_of_the_option_win_over_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"min_chunk": 512, "dense_layers": 2}))
    inline = {"minference": {"min_chunk": 256}, "another": {}}
    for environ, where in (({CONFIG_FILE_VARIABLE: str(path)}, f"{CONFIG_FILE_VARIABLE}={path}"), ({}, "defaults")):
        settings, *_ = check_settings(environ, None, LONG, CPU, inline)
        assert settings.what.startswith(f"--additional-config over {where}")
        assert settings.facts["settings"]["min_chunk"] == 256
        assert settings.facts["settings"]["dense_layers"] == (2 if environ else 0)


def test_an_option_without_settings_of_ours_is_not_named() -> None:
    settings, *_ = check_settings({}, None, LONG, CPU, {"another": {}})
    assert settings.what.startswith("defaults")


def test_settings_that_stand_where_no_server_reads_them_are_warned_of() -> None:
    found = next(check_settings({}, None, Limits(None, None), None, {"min_seq_len": 3}))
    assert (found.status, found.facts["settings"]["min_seq_len"]) == (Status.WARNING, MInferenceConfig().min_seq_len)
    assert 'write {"minference": {"min_seq_len": …}}' in found.what


def test_settings_that_a_server_refuses_are_a_fault(tmp_path: Path) -> None:
    settings, *others = check(tmp_path, {"min_chunk": -3}).values()
    assert settings.status is Status.FAILED
    assert "minference.min_chunk=-3" in settings.what
    assert {other.status for other in others} == {Status.SKIPPED}


def test_an_option_that_a_server_refuses_is_a_fault() -> None:
    for inline, says in (
        ({"min_chunk": -3}, "minference.min_chunk=-3"),
        ([], '--additional-config "minference" is []'),
    ):
        settings, *_ = check_settings({}, None, LONG, CPU, {"minference": inline})
        assert settings.status is Status.FAILED
        assert says in settings.what


def test_a_kernel_that_cannot_run_here_is_a_fault(tmp_path: Path) -> None:
    checked = check(tmp_path, {"kernel": "cuda"})["kernel"]
    assert checked.status is Status.FAILED
    assert "minference.kernel='cuda' cannot run here" in checked.what


@pytest.mark.parametrize(
    ("settings", "limits", "status", "says"),
    [
        ({}, LONG, Status.OK, "from 16384 tokens on"),
        ({"min_seq_len": 65_536}, LONG, Status.FAILED, "minference.min_seq_len is 65536, above the 65535 tokens"),
        ({"min_chunk": 8193}, LONG, Status.FAILED, "minference.min_chunk is 8193, above the 8192 rows"),
        ({}, Limits(), Status.SKIPPED, "--max-num-batched-tokens"),
        ({}, Limits(max_model_len=8192), Status.FAILED, "above the 8191 tokens"),
        ({}, Limits(max_num_batched_tokens=8192), Status.SKIPPED, "--max-model-len"),
    ],
)
def test_whether_the_gate_can_open(
    settings: dict[str, int], limits: Limits, status: Status, says: str, tmp_path: Path
) -> None:
    gate = check(tmp_path, settings, limits)["gate"]
    assert gate.status is status
    assert says in gate.what


def test_what_a_draft_model_takes_of_a_step_no_prompt_gets() -> None:
    found = doctors_settings._check_gate(MInferenceConfig(), 65_535, Budget(8192, 8192, slots=4))
    assert found.facts["longest_chunk"] == 8188 and "up to 8188 a step" in found.what


def test_a_gate_that_hardly_opens_beside_others_is_warned_of() -> None:
    found = doctors_settings._check_gate(MInferenceConfig(min_chunk=4096), 65_535, Budget(8192, 2048))
    assert found.status is Status.WARNING
    assert "hardly opens beside other requests" in found.what and "--long-prefill-token-threshold" in found.what


# A model


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with a configuration and no weights."""
    import_or_skip("vllm")
    shape = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 64}
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": 100, "dtype": "bfloat16", **TEXT, **shape}
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20_000}))
    return str(tmp_path)


def test_of_a_model_vllm_says_heads_and_limits(model: str, tmp_path: Path) -> None:
    checks = check(tmp_path, {"dense_layers": 1}, Limits(max_num_batched_tokens=4096), model)
    assert checks["model"].what == f"{model}: 8 query heads over 2 KV heads of 64"
    assert checks["layers"].facts["layers"] == ["dense_layer", "sparse", "sparse", "sparse"]
    assert checks["layers"].what == "3 of 4 attention layers may run sparse; always dense: dense_layer 1"
    assert (checks["gate"].status, checks["gate"].facts["longest_prompt"]) == (Status.OK, 19_999)


def test_what_vllm_refuses_is_a_fault(model: str, tmp_path: Path) -> None:
    checks = check(tmp_path, limits=Limits(max_model_len=10**7), model=model)
    assert checks["model"].status is Status.FAILED
    assert "max_model_len" in checks["model"].what
    assert {checks["layers"].status, checks["gate"].status} == {Status.SKIPPED}


def engine(cache_dtype: str = "auto", head_size: int = 128, **text: Any) -> Any:
    """vLLM's configuration of a model, as far as its layers are described from it."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(**{**TEXT, **text}),
            attn_type=text.get("attn_type", "decoder"),
            uses_alibi=bool(text.get("alibi")),
            use_mla="kv_lora_rank" in text,
            dtype=torch.bfloat16,
            get_head_size=lambda: head_size,
            model="a/model",
            served_model_name=None,
            model_arch_config=SimpleNamespace(
                total_num_hidden_layers=4, total_num_attention_heads=8, total_num_kv_heads=2, head_size=head_size
            ),
        ),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, use_ubatching=False),
        speculative_config=None,
        compilation_config=SimpleNamespace(static_forward_context={}),
    )


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        pytest.param({}, [SPARSE] * 4, id="plain"),
        pytest.param(
            {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 512},
            [Reason.SLIDING_WINDOW, SPARSE] * 2,
            id="some slide",
        ),
        pytest.param({"sliding_window": 512}, [Reason.SLIDING_WINDOW] * 4, id="all slide"),
        pytest.param({"sliding_window": 512, "use_sliding_window": False}, [SPARSE] * 4, id="window not used"),
        pytest.param(
            {"layer_types": ["chunked_attention"] * 3 + ["full_attention"], "attention_chunk_size": 512},
            [Reason.CHUNKED_LOCAL] * 3 + [SPARSE],
            id="chunked",
        ),
        pytest.param(
            {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, [NONE] * 3 + [SPARSE], id="hybrid"
        ),
        pytest.param({"layers_block_type": ["mamba", "attention"] * 2}, [NONE, SPARSE] * 2, id="state space"),
        pytest.param({"layer_types": ["indexed_attention"] * 4}, [OTHER] * 4, id="an attention of its own"),
        pytest.param({"kv_lora_rank": 512}, [OTHER] * 4, id="latent attention"),
        pytest.param({"attn_logit_softcapping": 50.0}, [Reason.SOFT_CAP] * 4, id="soft cap"),
        pytest.param({"alibi": True}, [Reason.ALIBI] * 4, id="alibi"),
        pytest.param({"num_kv_shared_layers": 1}, [SPARSE] * 3 + [Reason.KV_SHARING], id="shared keys"),
        pytest.param({"attn_type": "encoder_only"}, [Reason.NOT_DECODER] * 4, id="encoder"),
        pytest.param({"head_size": 96}, [Reason.HEAD_DIM] * 4, id="heads of 96"),
        pytest.param({"global_head_dim": 512}, [Reason.HEAD_DIM] * 4, id="larger heads with the whole context"),
        pytest.param({"cache_dtype": "fp8"}, [SPARSE] * 4, id="fp8 cache"),
        pytest.param({"cache_dtype": "fp8_e5m2"}, [Reason.QUANTIZED_KV] * 4, id="cache quantized otherwise"),
        pytest.param({"cache_dtype": "float16"}, [Reason.DTYPE] * 4, id="cache of another type"),
    ],
)
def test_layers_are_told_from_a_configuration(config: dict[str, Any], layers: list[str]) -> None:
    import_or_skip("vllm")
    assert describe_layers(engine(**config), dense_layers=()) == layers


def test_a_model_without_sparse_layers_is_a_fault(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "engine_config", lambda *_, **__: refusing_everything(model))
    checked = check(tmp_path, model=model)["layers"]
    assert checked.status is Status.FAILED
    assert checked.what == "0 of 4 attention layers may run sparse; always dense: head_dim 4"


def refusing_everything(model: str) -> Any:
    config = engine(head_size=96)
    vars(config.model_config).update(
        max_model_len=65_536, get_num_attention_heads=lambda _: 8, get_num_kv_heads=lambda _: 2
    )
    config.parallel_config.tensor_parallel_size = 1
    config.scheduler_config = SimpleNamespace(max_num_batched_tokens=8192)
    return config
