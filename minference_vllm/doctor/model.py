# SPDX-License-Identifier: Apache-2.0
"""What a model's configuration says about its attention layers, before the model is loaded."""

from collections.abc import Container, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from minference_vllm.compat import quantization
from minference_vllm.layers import DECODER, SparseLayer, traits_of

SPARSE = "sparse"
"""What describes a layer that may run sparse."""

NONE = "no attention"
OTHER = "another backend"

FULL_KINDS = {"full_attention", "attention", "hybrid"}
SLIDING_KINDS = {"sliding_attention", "hybrid_sliding"}
CHUNKED_KINDS = {"chunked_attention"}
NO_ATTENTION_KINDS = {"linear_attention", "mamba", "mamba2", "conv", "moe", "mlp", "recurrent"}
"""Layers without attention, as Hugging Face configurations name them in `layer_types` and `layers_block_type`."""

NAME = "model.layers.{}.self_attn.attn"


def describe_layers(vllm_config: Any, dense_layers: Container[int | None]) -> list[str]:
    """For each layer of the model: SPARSE, the reason why it always runs dense, NONE or OTHER.

    The rules are the server's. A server asks the layers themselves; here the configuration is asked instead, which
    works where models use the usual names. What the layers said is in the server's log.

    Args:
        vllm_config: the engine's configuration.
        dense_layers: layers that the settings or a pattern file keep dense.
    """
    return [
        _describe(index, kind, vllm_config, dense_layers)
        for index, kind in enumerate(_kinds(vllm_config.model_config.hf_text_config))
    ]


def _kinds(text: Any) -> Iterator[str]:
    """The kind of each layer."""
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if not kinds:
        slides = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
        kinds = ["sliding_attention" if slides else "full_attention"] * text.num_hidden_layers
    yield from kinds[: text.num_hidden_layers]


def _describe(index: int, kind: str, vllm_config: Any, dense_layers: Container[int | None]) -> str:
    if kind in NO_ATTENTION_KINDS:
        return NONE
    if kind not in FULL_KINDS | SLIDING_KINDS | CHUNKED_KINDS or vllm_config.model_config.use_mla:
        return OTHER
    layer = _layer(index, kind, vllm_config)
    reason = traits_of(NAME.format(index), layer, vllm_config, dense_layers).dense_reason
    return SPARSE if reason is None else reason.value


def _layer(index: int, kind: str, vllm_config: Any) -> Any:
    """A stand-in for a layer of vLLM's, with what `traits_of` reads of it."""
    model = vllm_config.model_config
    text = model.hf_text_config
    num_shared = getattr(text, "num_kv_shared_layers", None) or 0
    # Gemma 4's layers that attend to the whole context have larger heads than its other layers.
    head_dim = getattr(text, "global_head_dim", None) if kind in FULL_KINDS else None
    impl = SimpleNamespace(
        WINDOW_OFF=SparseLayer.WINDOW_OFF,
        attn_type=model.attn_type if model.attn_type == "encoder_only" else DECODER,
        sliding_window=getattr(text, "sliding_window", None) if kind in SLIDING_KINDS else SparseLayer.WINDOW_OFF,
        alibi_slopes=True if model.uses_alibi else None,
        logits_soft_cap=getattr(text, "attn_logit_softcapping", None),
        kv_cache_dtype=vllm_config.cache_config.cache_dtype,
        kv_sharing_target_layer_name="" if index >= text.num_hidden_layers - num_shared else None,
        head_size=head_dim or model.get_head_size(),
        num_kv_heads=1,
    )
    chunk_size = getattr(text, "attention_chunk_size", None) if kind in CHUNKED_KINDS else None
    one = torch.ones(())  # vLLM's layers have one number, whatever the checkpoint holds
    return SimpleNamespace(
        impl=impl, attention_chunk_size=chunk_size, kv_cache_torch_dtype=quantization.kv_cache_dtype(vllm_config),
        _q_scale=one, _k_scale=one, _v_scale=one,
    )  # fmt: skip
