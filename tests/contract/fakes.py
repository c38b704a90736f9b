# SPDX-License-Identifier: Apache-2.0
"""A worker's objects without a worker: our builder and layers on a CPU, around the parts of vLLM that need no GPU."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import torch
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from minference_vllm import impl as impl_module
from minference_vllm.config import MInferenceConfig
from minference_vllm.impl import MInferenceImpl
from minference_vllm.metadata import MInferenceBuilder
from minference_vllm.runtime import Runtime

HEADS, KV_HEADS, HEAD_DIM, PAGE = 4, 2, 64, 16
NUM_LAYERS = 4
NAME = "model.layers.{}.self_attn.attn"
CPU = torch.device("cpu")
# Every key is kept, so that sparse attention must equal dense attention.
EVERYTHING = 10_000


@dataclass(frozen=True)
class Row:
    """One request of a step."""

    rows: int
    context_len: int = 0
    prefill: bool = True


DECODE = Row(1, 150, prefill=False)
SHORT = Row(20)
LONG = Row(140, 60)
# Requests of all three kinds, in no order, as vLLM's V1 runner leaves them.
MIXED = (DECODE, LONG, SHORT, DECODE, LONG)


def make_runtime(publish: bool = True, **settings: Any) -> Runtime:
    method = {"name": "vertical_slash", "vertical_size": EVERYTHING, "slash_size": EVERYTHING}
    gate = {"min_seq_len": 200, "min_chunk": 100, "method": method, "log_every": 0}
    runtime = Runtime(MInferenceConfig(**{**gate, **settings}), CPU, publish)
    runtime.counters.start = Mock()  # tests start no thread
    return runtime


def make_config(**changes: Any) -> Any:
    """The parts of a VllmConfig that FlashAttention's builder and ours read."""
    model = SimpleNamespace(
        dtype=torch.bfloat16,
        max_model_len=512,
        hf_config=SimpleNamespace(model_type="llama"),
        hf_text_config=SimpleNamespace(num_hidden_layers=NUM_LAYERS),
        get_num_attention_heads=lambda _: HEADS,
        get_total_num_hidden_layers=lambda: NUM_LAYERS,
        rswa_window=changes.get("rswa_window"),
        is_mm_prefix_lm=changes.get("is_mm_prefix_lm", False),
    )
    parallel = SimpleNamespace(
        decode_context_parallel_size=changes.get("dcp", 1),
        prefill_context_parallel_size=changes.get("pcp", 1),
        cp_kv_cache_interleave_size=1,
        use_ubatching=changes.get("ubatching", False),
    )
    no_graphs = SimpleNamespace(has_full_cudagraphs=lambda: False)
    return SimpleNamespace(
        additional_config={},
        use_v2_model_runner=changes.get("v2", True),
        model_config=model,
        parallel_config=parallel,
        scheduler_config=SimpleNamespace(max_num_batched_tokens=512, max_num_seqs=8, long_prefill_token_threshold=0),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        compilation_config=SimpleNamespace(
            static_forward_context={}, cudagraph_mode=no_graphs, max_cudagraph_capture_size=0
        ),
        attention_config=SimpleNamespace(flash_attn_max_num_splits_for_cuda_graph=0),
        kernel_config=SimpleNamespace(enable_jit_warmup=False),
    )


def make_impl(runtime: Runtime, config: Any = None, **changes: Any) -> MInferenceImpl:
    """One layer's implementation; `changes` are FlashAttentionImpl's arguments."""
    plain = {
        "num_heads": HEADS,
        "head_size": HEAD_DIM,
        "scale": HEAD_DIM**-0.5,
        "num_kv_heads": KV_HEADS,
        "alibi_slopes": None,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
    }
    with (
        patch.object(torch.cuda, "current_device", lambda: 0),
        patch.object(impl_module, "runtime_of", lambda *_: runtime),
        patch.object(impl_module, "get_current_vllm_config", lambda: config or make_config()),
    ):
        return MInferenceImpl(**{**plain, **changes})


def add_layers(
    impls: dict[str, MInferenceImpl],
    config: Any,
    dtype: torch.dtype = torch.bfloat16,
    is_draft_layer: bool = False,
    chunk_size: int | None = None,
    scales: dict[str, torch.Tensor] | None = None,
) -> Any:
    """The configuration of a model that has these layers too, with a cache of this type."""
    for name, impl in impls.items():
        layer = Attention.__new__(Attention)
        layer.__dict__.update(
            impl=impl,
            layer_name=name,
            num_heads=impl.num_heads,
            is_draft_layer=is_draft_layer,
            kv_cache_torch_dtype=dtype,
            **(scales or {}),
        )
        if chunk_size is not None:
            layer.__dict__["attention_chunk_size"] = chunk_size
        config.compilation_config.static_forward_context[name] = layer
        impl._vllm_config = config
    return config


def make_builder(
    impls: dict[str, MInferenceImpl],
    config: Any = None,
    dtype: torch.dtype = torch.bfloat16,
    is_draft_layer: bool = False,
    chunk_size: int | None = None,
    kind: type[MInferenceBuilder] = MInferenceBuilder,
    scales: dict[str, torch.Tensor] | None = None,
) -> MInferenceBuilder:
    """The builder of a KV cache group whose layers have these names and, if chunk_size is given, attend locally."""
    config = add_layers(impls, config or make_config(), dtype, is_draft_layer, chunk_size, scales)
    spec = FullAttentionSpec(block_size=PAGE, num_kv_heads=KV_HEADS, head_size=HEAD_DIM, dtype=dtype)
    return kind(spec, list(impls), config, CPU)


def one_group(layers: int = 2) -> tuple[Runtime, MInferenceBuilder, list[MInferenceImpl]]:
    """The objects of a model with one KV cache group."""
    runtime = make_runtime()
    impls = [make_impl(runtime) for _ in range(layers)]
    return runtime, make_builder({NAME.format(i): impl for i, impl in enumerate(impls)}), impls


def has_plan(metadata: Any) -> bool:
    """Whether any chunk of the step runs sparse."""
    return getattr(metadata, "minference", None) is not None


def finish(runtime: Runtime, metadata: Any) -> None:
    """Does what follows when the layers have run a step in which something runs sparse."""
    runtime.finish_step(metadata.minference.record)


def counted(runtime: Runtime) -> dict[tuple[str, str], int]:
    return dict(runtime.counters.snapshot().tokens)


def make_common(*batch: Row, **changes: Any) -> CommonAttentionMetadata:
    """A step as vLLM's runners describe it; requests have their pages one after the other."""
    starts = torch.tensor([0, *(row.rows for row in batch)]).cumsum(0).to(torch.int32)
    seq_lens = torch.tensor([row.context_len + row.rows for row in batch], dtype=torch.int32)
    pages = 512 // PAGE
    table = torch.arange(len(batch) * pages, dtype=torch.int32).view(len(batch), pages)
    plain = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": seq_lens,
        "num_reqs": len(batch),
        "num_actual_tokens": int(starts[-1]),
        "max_query_len": max(row.rows for row in batch),
        "max_seq_len": int(seq_lens.max()),
        "block_table_tensor": table,
        "slot_mapping": torch.arange(int(starts[-1])),
        "is_prefilling": torch.tensor([row.prefill for row in batch]),
        "seq_lens_cpu_upper_bound": seq_lens,
    }
    return CommonAttentionMetadata(**{**plain, **changes})
