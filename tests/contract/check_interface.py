# SPDX-License-Identifier: Apache-2.0
"""What our code takes for granted in vLLM. Run by test_vllm_033.py, with that release on the path."""

import ast
import copy
import dataclasses
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from vllm.config import (
    AttentionConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
    get_layers_from_vllm_config,
)
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import AttentionSelectorConfig
from vllm.v1.executor.multiproc_executor import WorkerProc
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from minference_vllm import plugin
from minference_vllm.backend import MInferenceBackend
from minference_vllm.impl import MInferenceImpl
from minference_vllm.metadata import MInferenceBuilder
from tests.contract.wheel import VERSION
from tests.unit import test_compat
from tests.unit.test_compat import *  # noqa: F403 - the same holds in this release
from tests.unit.test_compat_limits import test_the_limits_are_vllms  # noqa: F401
from tests.unit.test_compat_pipeline import *  # noqa: F403

FORWARD = "layer query key value kv_cache attn_metadata output output_scale output_block_scale"
INIT = (
    "num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype logits_soft_cap attn_type "
    "kv_sharing_target_layer_name sinks"
)
FLASH_ATTENTION = (
    "q k v out cu_seqlens_q max_seqlen_q seqused_k max_seqlen_k softmax_scale causal block_table fa_version"
)


def parameters(function: Any) -> str:
    return " ".join(name for name in inspect.signature(function).parameters if name != "self")


def fields(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minference_vllm.metrics.exporter.install", lambda: None)
    plugin.register()


def test_this_is_the_release() -> None:
    assert vllm.__version__ == VERSION


def test_layers_that_attend_within_chunks_say_so() -> None:
    assert "self.attention_chunk_size = attention_chunk_size" in inspect.getsource(ChunkedLocalAttention.__init__)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (FlashAttentionMetadataBuilder.__init__, "kv_cache_spec layer_names vllm_config device"),
        (FlashAttentionMetadataBuilder.build, "common_prefix_len common_attn_metadata fast_build"),
        (FlashAttentionMetadataBuilder.build_for_cudagraph_capture, "common_attn_metadata"),
        (FlashAttentionMetadataBuilder.build_for_drafting, "common_attn_metadata draft_index"),
        (FlashAttentionMetadataBuilder.update_block_table, "metadata blk_table slot_mapping"),
        (FlashAttentionImpl.__init__, INIT),
        (FlashAttentionImpl.forward, FORWARD),
        (get_layers_from_vllm_config, "vllm_config layer_type layer_names"),
    ],
    ids=lambda value: value.__qualname__ if callable(value) else "",
)
def test_parameters_of_what_we_override_and_call(function: Any, expected: str) -> None:
    assert parameters(function) == expected


def test_attention_can_be_called_as_tune_does() -> None:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    inspect.signature(flash_attn_varlen_func).bind(**dict.fromkeys(FLASH_ATTENTION.split()))
    inspect.signature(get_flash_attn_version).bind(head_size=128)


@pytest.mark.parametrize(
    ("ours", "stock"),
    [
        (MInferenceBuilder, FlashAttentionMetadataBuilder),
        (MInferenceImpl, FlashAttentionImpl),
        (MInferenceBackend, FlashAttentionBackend),
    ],
    ids=lambda cls: cls.__name__,
)
def test_our_methods_take_what_the_stock_ones_take(ours: type, stock: type) -> None:
    overridden = {name for name, member in vars(ours).items() if callable(member) and hasattr(stock, name)}
    overridden -= {"__init__"} if ours is MInferenceImpl else set()  # it takes *args, **kwargs
    assert overridden
    for name in overridden:
        assert parameters(getattr(ours, name)).startswith(parameters(getattr(stock, name))), name


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (
            CommonAttentionMetadata,
            "query_start_loc query_start_loc_cpu seq_lens num_reqs num_actual_tokens max_query_len max_seq_len "
            "block_table_tensor slot_mapping causal logits_indices_padded is_prefilling seq_lens_cpu_upper_bound "
            "mm_req_doc_ranges rswa_prefix_lens",
        ),
        (
            FlashAttentionMetadata,
            "num_actual_tokens max_query_len query_start_loc max_seq_len seq_lens block_table slot_mapping "
            "scheduler_metadata max_num_splits causal mm_prefix_query_range_tensor rswa_prefix_lens",
        ),
        (VllmConfig, "additional_config model_config parallel_config scheduler_config"),
        (ParallelConfig, "decode_context_parallel_size prefill_context_parallel_size"),
        (SchedulerConfig, "max_num_batched_tokens"),
        (ModelConfig, "dtype max_model_len"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_fields_that_we_read(config: type, names: str) -> None:
    assert set(names.split()) <= fields(config)


def test_metadata_takes_and_keeps_a_further_attribute() -> None:
    common = dict.fromkeys(fields(FlashAttentionMetadata))
    metadata = FlashAttentionMetadata(**common)
    metadata.minference = "plan"
    assert copy.copy(metadata).minference == "plan"
    assert dataclasses.replace(metadata, max_seq_len=7).max_seq_len == 7


def test_the_rest_that_compat_asks_for() -> None:
    from vllm import envs
    from vllm.distributed.parallel_state import GroupCoordinator, get_pp_group, get_tp_group
    from vllm.model_executor.models.utils import extract_layer_index

    assert extract_layer_index("model.layers.17.self_attn.attn") == 17
    with pytest.raises(AssertionError):
        extract_layer_index("vision.attn")
    assert envs.VLLM_BATCH_INVARIANT in (True, False)
    assert callable(get_pp_group)
    assert callable(get_tp_group)
    assert {"rank_in_group", "world_size"} <= set(GroupCoordinator.__annotations__)
    assert Attention.is_draft_layer is False


def test_full_cuda_graphs_are_for_uniform_batches() -> None:
    assert MInferenceBuilder.get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_BATCH


def test_the_command_line_takes_the_name_and_it_survives_pickling() -> None:
    config = AttentionConfig(backend="minference")
    assert config.backend is AttentionBackendEnum.CUSTOM
    pickled = pickle.dumps(config)
    del AttentionBackendEnum._member_map_["MINFERENCE"]  # as in a spawned process that has not yet loaded plugins
    assert pickle.loads(pickled).backend is AttentionBackendEnum.CUSTOM


def test_a_backend_registered_by_name_does_not_survive_pickling() -> None:
    # This is why we use the CUSTOM member and an alias. Once this test fails, we can have a member of our own.
    register_backend("CONTRACT_TEST", "contract.Backend")
    member = AttentionBackendEnum["CONTRACT_TEST"]
    pickled = pickle.dumps(member)
    del AttentionBackendEnum._member_map_["CONTRACT_TEST"]
    del AttentionBackendEnum._value2member_map_["contract.Backend"]
    with pytest.raises(ValueError, match="not a valid"):
        pickle.loads(pickled)


def test_the_backend_is_what_vllm_resolves_and_looks_up() -> None:
    assert AttentionBackendEnum["MINFERENCE"].get_class() is MInferenceBackend
    assert AttentionBackendEnum[MInferenceBackend.get_name()] is AttentionBackendEnum.CUSTOM
    assert MInferenceBackend.get_impl_cls() is MInferenceImpl
    assert MInferenceBackend.get_builder_cls() is MInferenceBuilder


@pytest.mark.parametrize(
    ("changes", "is_served"),
    [
        ({}, True),
        ({"head_size": 96}, True),
        ({"head_size": 100}, False),
        ({"dtype": torch.float32}, False),
        ({"use_mla": True}, False),
    ],
    ids=str,
)
def test_we_serve_and_refuse_what_flash_attention_does(changes: dict[str, Any], is_served: bool) -> None:
    plain = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16}
    selector = AttentionSelectorConfig(**{**plain, **changes})._asdict()
    capability = DeviceCapability(9, 0)
    ours = MInferenceBackend.validate_configuration(device_capability=capability, **selector)
    assert ours == FlashAttentionBackend.validate_configuration(device_capability=capability, **selector)
    assert (ours == []) == is_served


@pytest.mark.usefixtures("flash_attention_4")
def test_registration_has_models_take_us_for_flash_attention() -> None:
    settled = test_compat.configured("Gemma4ForCausalLM", AttentionBackendEnum.CUSTOM)
    assert (settled.backend, settled.flash_attn_version) == (AttentionBackendEnum.CUSTOM, 4)


@pytest.mark.parametrize("executor", [UniProcExecutor, WorkerProc])
def test_each_executor_settles_the_page_size_once_a_worker_has_its_layers(executor: type) -> None:
    # In that update a worker says if no layer is ours, so it must follow the loading of the model.
    source = inspect.getsource(executor)
    assert 0 < source.index(".load_model()") < source.index("current_platform.update_block_size_for_backend(")


def test_every_place_that_compares_with_flash_attention_is_documented() -> None:
    root = Path(vllm.__file__).parent
    documented = (Path(__file__).parents[2] / "docs" / "compatibility.md").read_text()
    found = {str(path.relative_to(root)) for path in root.rglob("*.py") if compares_with_flash_attention(path)}
    assert "model_executor/models/config.py" in found
    assert [name for name in sorted(found) if f"`{name}" not in documented] == []


def compares_with_flash_attention(path: Path) -> bool:
    source = path.read_text()
    if "FLASH_ATTN" not in source:
        return False
    compared = (ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Compare))
    return any(re.search(r"\bFLASH_ATTN\b", text) for text in compared)
