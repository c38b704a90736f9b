# SPDX-License-Identifier: Apache-2.0
"""What a layer is and whether it can ever go sparse: decided once, when the model is built."""

from collections.abc import Callable
from dataclasses import dataclass

from minference_vllm.plan import Reason

SUPPORTED_HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True, slots=True)
class LayerTraits:
    """The properties of an attention layer that decide whether it may run sparse."""

    is_decoder: bool
    has_sliding_window: bool
    has_alibi: bool
    has_soft_cap: bool
    has_sinks: bool
    has_quantized_kv: bool
    shares_kv: bool
    is_context_parallel: bool
    is_micro_batched: bool
    is_batch_invariant: bool
    head_dim: int

    @property
    def dense_reason(self) -> Reason | None:
        """The first rule that keeps the layer dense, None if it may run sparse."""
        return next((reason for reason, applies in _RULES if applies(self)), None)


_RULES: tuple[tuple[Reason, Callable[[LayerTraits], bool]], ...] = (
    (Reason.NOT_DECODER, lambda layer: not layer.is_decoder),
    (Reason.SLIDING_WINDOW, lambda layer: layer.has_sliding_window),
    (Reason.ALIBI, lambda layer: layer.has_alibi),
    (Reason.SOFT_CAP, lambda layer: layer.has_soft_cap),
    (Reason.ATTENTION_SINKS, lambda layer: layer.has_sinks),
    (Reason.QUANTIZED_KV, lambda layer: layer.has_quantized_kv),
    (Reason.KV_SHARING, lambda layer: layer.shares_kv),
    (Reason.CONTEXT_PARALLEL, lambda layer: layer.is_context_parallel),
    # Micro-batches run side by side, and the scratch is one.
    (Reason.MICRO_BATCHING, lambda layer: layer.is_micro_batched),
    (Reason.BATCH_INVARIANT, lambda layer: layer.is_batch_invariant),
    (Reason.HEAD_DIM, lambda layer: layer.head_dim not in SUPPORTED_HEAD_DIMS),
)
