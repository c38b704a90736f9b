# SPDX-License-Identifier: Apache-2.0
"""Which attention layers of the model may ever run sparse: decided once for all of them, and logged in one line."""

import logging
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any

from minference_vllm import compat
from minference_vllm.compat import quantization
from minference_vllm.plan import LayerTraits
from minference_vllm.reason import Reason

logger = logging.getLogger("vllm.minference")


DECODER = "decoder"  # vLLM's AttentionType of causal self-attention


class SparseLayer:
    """Base class that marks an attention implementation as the plugin's, and holds what is decided about its layer.

    Attributes:
        WINDOW_OFF: the value of `sliding_window` in a layer without a sliding window.
        is_decided: whether the attributes below have been set.
        dense_reason: why the layer never runs sparse; None if it may.
        index: number of the layer in the whole model, across pipeline stages; None if the layer's name does not give
            one.
        number: the number by which log and metrics name a layer that may run sparse: its index or, if one of these
            layers on this worker has no index or two have the same, its position.
        position: place of the layer among the plugin's layers on this worker, in the order in which they run.
        num_layers: number of the plugin's layers on this worker.
        is_last_sparse: whether no layer after it may run sparse.
    """

    WINDOW_OFF: Any = None

    is_decided = False
    dense_reason: Reason | None = None
    index: int | None = None
    number = -1
    position = -1
    num_layers = 0
    is_last_sparse = False

    # Set by vLLM's attention implementation, the other base class.
    attn_type: str
    head_size: int
    num_kv_heads: int
    sliding_window: Any
    alibi_slopes: Any
    logits_soft_cap: float | None
    kv_cache_dtype: str
    kv_sharing_target_layer_name: str | None


def decide_layers(vllm_config: Any, publish: bool, dense_layers: Container[int | None]) -> None:
    """Decide for every attention layer of ours whether it may ever run sparse, if that is not decided yet.

    All of the model's layers exist before any of them runs, so the first layer that asks decides for all of them.

    Args:
        vllm_config: the engine's configuration, which holds the layers.
        publish: whether this worker writes the log line of its pipeline stage.
        dense_layers: indices of the layers that are to run dense.
    """
    ours = {name: layer for name, layer in compat.attention_layers(vllm_config).items() if compat.is_ours(layer)}
    impls = [layer.impl for layer in ours.values()]
    if all(impl.is_decided for impl in impls):
        return
    for position, (name, layer) in enumerate(ours.items()):
        layer.impl.position, layer.impl.num_layers = position, len(impls)
        layer.impl.index = compat.layer_index(name)
        layer.impl.dense_reason = traits_of(name, layer, vllm_config, dense_layers).dense_reason
        layer.impl.is_decided = True
    sparse = [impl for impl in impls if impl.dense_reason is None]
    for impl in impls:
        impl.is_last_sparse = impl is sparse[-1] if sparse else False
    indices = [impl.index for impl in sparse if impl.index is not None]
    numbers = indices if len(set(indices)) == len(sparse) else [impl.position for impl in sparse]
    for impl, number in zip(sparse, numbers, strict=True):
        impl.number = number
    if publish:
        _report(impls, compat.foreign_layers(vllm_config))


def traits_of(name: str, layer: Any, vllm_config: Any, dense_layers: Container[int | None]) -> LayerTraits:
    """What decides whether a layer of ours may run sparse."""
    impl, parallel = layer.impl, vllm_config.parallel_config
    is_fp8 = quantization.is_fp8(impl.kv_cache_dtype) and quantization.fp8_scales(layer, impl.num_kv_heads) is not None
    return LayerTraits(
        is_decoder=impl.attn_type == DECODER,
        has_sliding_window=impl.sliding_window != impl.WINDOW_OFF,
        attends_within_chunks=bool(getattr(layer, "attention_chunk_size", None)),
        has_alibi=impl.alibi_slopes is not None,
        has_soft_cap=bool(impl.logits_soft_cap),
        has_other_quantization=quantization.is_quantized(impl.kv_cache_dtype) and not is_fp8,
        # vLLM stores an FP8 cache as bytes, so its dtype is never the model's.
        has_other_dtype=not is_fp8 and layer.kv_cache_torch_dtype != vllm_config.model_config.dtype,
        shares_kv=impl.kv_sharing_target_layer_name is not None,
        is_context_parallel=parallel.decode_context_parallel_size > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        is_micro_batched=parallel.use_ubatching,
        is_batch_invariant=compat.batch_invariant(),
        is_draft=compat.is_draft_layer(name, layer, vllm_config),
        is_kept_dense=compat.layer_index(name) in dense_layers,
        head_dim=impl.head_size,
    )


def _report(impls: Sequence[SparseLayer], foreign: Mapping[str, str]) -> None:
    """Log in one line how many of this worker's layers may run sparse; layers of a draft model are not counted."""
    reasons = [impl.dense_reason for impl in impls if impl.dense_reason is not Reason.DRAFT_LAYER]
    dense = Counter(reason.value for reason in reasons if reason is not None)
    parts = [f"{reasons.count(None)} of {len(reasons) + len(foreign)} attention layers may run sparse"]
    if dense:
        named = ", ".join(f"{reason} {count}" for reason, count in dense.most_common())
        parts.append(f"{dense.total()} always run dense ({named})")
    if foreign:
        named = ", ".join(f"{backend} {count}" for backend, count in Counter(foreign.values()).most_common())
        parts.append(f"{len(foreign)} are not the plugin's, since the model chooses their backend ({named})")
    logger.info("MInference: %s.", "; ".join(parts))
