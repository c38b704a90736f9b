# SPDX-License-Identifier: Apache-2.0
"""Which attention layers of the model may ever run sparse: decided once for all of them, and said in one line."""

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
    """What marks an attention implementation as ours, and what is decided of it.

    Attributes:
        WINDOW_OFF: what `sliding_window` is in a layer that has none.
        is_decided: whether the attributes below hold.
        dense_reason: why the layer never runs sparse; None if it may.
        index: of the layer in the whole model, across pipeline stages; None if its name does not say.
        number: by which log and metrics name a layer that may run sparse: its index, unless a layer of this worker has
            none or two have the same; then its position.
        position: of the layer among ours on this worker, in the order in which they run.
        num_layers: of ours on this worker.
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

    # vLLM's implementation beside this class sets these.
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

    All of the model's layers exist before any of them runs, so the first that needs to know has all decided.

    Args:
        vllm_config: the engine's configuration, which holds the layers.
        publish: whether this worker speaks for its pipeline stage in the log.
        dense_layers: indices of those that are to run dense.
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
        # vLLM keeps FP8 as bytes.
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
    """Say in one line for all layers here what may run sparse; a draft model's layers are not the model's."""
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
