# SPDX-License-Identifier: Apache-2.0
"""The attention layer on a GPU: FlashAttention's, but for the chunks that the step's plan names."""

import logging
from typing import Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadata

from minference_vllm import compat
from minference_vllm.config import ConfigError, MInferenceConfig, load_config
from minference_vllm.engine import report_head_dim
from minference_vllm.group import LayerGroup
from minference_vllm.index import PagedKV
from minference_vllm.layers import LayerTraits
from minference_vllm.plan import Reason, Step
from minference_vllm.runtime import Runtime
from minference_vllm.workspace import Geometry

logger = logging.getLogger("vllm.minference")

_runtimes: dict[tuple[torch.device, MInferenceConfig], Runtime] = {}


class SparseLayerMixin:
    """What a sparse layer adds to an attention implementation of vLLM, on whatever device."""

    # vLLM's implementation beside this mixin sets these.
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    attn_type: str
    sliding_window: Any
    alibi_slopes: torch.Tensor | None
    logits_soft_cap: float | None
    sinks: torch.Tensor | None
    kv_cache_dtype: str
    kv_sharing_target_layer_name: str | None

    group: LayerGroup | None = None  # from when its metadata builder is made

    def join_runtime(self, device: torch.device, window_off: Any) -> None:
        """Find the worker's runtime, and decide whether this layer may ever go sparse. Called once, at construction.

        Args:
            window_off: what `self.sliding_window` is when the layer has none.
        """
        vllm_config = get_current_vllm_config()
        self.runtime = _runtime(vllm_config, device)
        config, parallel = self.runtime.config, vllm_config.parallel_config
        self._model_dtype = vllm_config.model_config.dtype
        self._geometry = Geometry(
            num_qo_heads=self.num_heads,
            max_seq_len=vllm_config.model_config.max_model_len,
            max_chunk=min(vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.model_config.max_model_len),
            num_probes=sum(config.probe_counts),
            max_columns=config.vertical_size,
        )
        self.dense_reason: Reason | None = LayerTraits(
            is_decoder=self.attn_type == AttentionType.DECODER,
            has_sliding_window=self.sliding_window != window_off,
            has_alibi=self.alibi_slopes is not None,
            has_soft_cap=bool(self.logits_soft_cap),
            has_sinks=self.sinks is not None,
            has_quantized_kv=compat.is_quantized(self.kv_cache_dtype),
            shares_kv=self.kv_sharing_target_layer_name is not None,
            is_context_parallel=parallel.decode_context_parallel_size > 1
            or getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            is_micro_batched=parallel.use_ubatching,
            is_batch_invariant=compat.batch_invariant(),
            head_dim=self.head_size,
        ).dense_reason

    def settle(self, late_reason: Reason | None) -> None:
        """Take in what the metadata builder knows of this layer."""
        self.dense_reason = self.dense_reason or late_reason

    def claim_scratch(self) -> None:
        """Claim the scratch memory now, in the profiling run, so that the KV cache is sized with it."""
        if self.dense_reason is None:
            self.runtime.workspace(self._geometry)

    def warm_up(self, page_size: int) -> None:
        """Compile this layer's kernels before the first request."""
        report_head_dim(self.runtime.engine, self.head_size)
        self.runtime.warm_up(self.num_kv_heads, self.head_size, page_size, self._model_dtype, self._geometry)

    def run_sparse(
        self, step: Step, query: torch.Tensor, kv_cache: torch.Tensor, block_table: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Sparse attention for every chunk of the step.

        Args:
            query, output: [num_tokens, num_heads, head_size].
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], any strides.
        """
        k, v = kv_cache.split(self.head_size, dim=-1)
        for chunk in step.chunks:
            kv = PagedKV(k, v, block_table, chunk.request)
            self.runtime.run(query, kv, chunk, self.scale, self._geometry, output)
        if self.group is not None:
            self.group.count_layer()

    def step_in(self) -> None:
        """Look for a plan in the metadata of the steps that follow, as a new layer does."""

    def step_aside(self) -> None:
        """There is no plan to look for until the next `step_in`."""


def _runtime(vllm_config: VllmConfig, device: torch.device) -> Runtime:
    try:
        config = load_config(vllm_config.additional_config)
        # A process may hold one engine after another.
        if (device, config) not in _runtimes:
            _runtimes[device, config] = Runtime(config, device, compat.reports_metrics())
    except ConfigError as error:
        # The exception ends in a traceback of the worker's; this line is for the user.
        logger.error("MInference cannot start: %s", error)
        raise
    return _runtimes[device, config]


class MInferenceImpl(SparseLayerMixin, FlashAttentionImpl):
    """FlashAttention with sparse prefill."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.join_runtime(torch.device("cuda", torch.cuda.current_device()), window_off=(-1, -1))

    def step_in(self) -> None:
        self.__dict__.pop("forward", None)

    def step_aside(self) -> None:
        # Not a flag to look at: the layer's steps cost then what they cost without us.
        self.forward = super().forward  # type: ignore[method-assign]

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See FlashAttentionImpl.forward; rows that the plan does not name run there, exactly as without us."""
        step: Step | None = getattr(attn_metadata, "minference", None)
        if step is None or attn_metadata is None or self._stays_dense(output_scale, output_block_scale):
            if attn_metadata is None:
                self.claim_scratch()
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        for run, metadata in step.dense_runs:
            rows = slice(run.query_start, run.query_end)
            super().forward(layer, query[rows], key, value, kv_cache, metadata, output[rows])
        self.run_sparse(step, query, kv_cache, attn_metadata.block_table, output)
        return output

    def _stays_dense(self, *scales: torch.Tensor | None) -> bool:
        """Whether this layer runs dense even in a step in which others go sparse."""
        is_fused = any(scale is not None for scale in scales)  # which FlashAttention refuses
        return is_fused or self.dense_reason is not None or torch.cuda.is_current_stream_capturing()
