# SPDX-License-Identifier: Apache-2.0
"""The attention layer on a GPU: FlashAttention's, except for the chunks that run sparse by the step's plan."""

import logging
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl, FlashAttentionMetadata

from minference_vllm import compat
from minference_vllm.chunk import FP8, Chunk, PagedKV
from minference_vllm.compat import pages, quantization
from minference_vllm.config import load_config, misplaced
from minference_vllm.errors import ConfigError
from minference_vllm.layers import SparseLayer, decide_layers
from minference_vllm.patterns import AutoSettings
from minference_vllm.plan import DenseRun, SparseChunk
from minference_vllm.runtime import Runtime
from minference_vllm.scratch import ScratchShape
from minference_vllm.step import Step, run_metadata

logger = logging.getLogger("vllm.minference")

_runtimes: WeakValueDictionary[tuple[int, torch.device, str], Runtime] = WeakValueDictionary()
"""Runtimes by engine, device and settings. Only the engine's layers hold them, so they and their scratch are freed with
the engine."""


class SparseLayerMixin(SparseLayer):
    """What a sparse layer adds to an attention implementation of vLLM, on any device."""

    # Set by vLLM's attention implementation, the other base class.
    num_heads: int
    scale: float
    sinks: torch.Tensor | None
    supports_quant_query_input: bool

    def attach_runtime(self, device: torch.device) -> None:
        """Find the worker's runtime. Called once, at construction."""
        self._vllm_config = vllm_config = get_current_vllm_config()
        self.is_of_drafter = compat.is_loading_drafter()
        self.runtime = runtime_of(vllm_config, device)
        model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        has_fp8_kv = quantization.is_fp8(self.kv_cache_dtype)
        self.shape = ScratchShape(
            num_qo_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            dtype=model.dtype,
            max_seq_len=model.max_model_len,
            max_chunk=min(scheduler.max_num_batched_tokens, model.max_model_len),
            has_fp8_kv=has_fp8_kv,
            has_fp8_q=has_fp8_kv and self.supports_quant_query_input,
            sinks_dtype=None if self.sinks is None else self.sinks.dtype,
        )

    def decide(self) -> None:
        """Decide which of the model's layers may run sparse, and claim scratch if this is one of them.

        First called in the profiling run: vLLM subtracts the memory that is allocated then when it sizes the KV cache.

        Raises:
            ConfigError: the pattern file does not fit the layer, or the kernels do not support what the settings ask
            for.
        """
        if not self.is_decided:
            decide_layers(self._vllm_config, self.runtime.publish, self.runtime.dense_layers)
        if self.dense_reason is None:
            try:
                self.layer_state = self.runtime.layer_state(
                    self.shape, self.position, self.num_layers, self.index, self.number
                )
            except ConfigError as error:  # found only once a layer's heads are known
                raise refused(str(error)) from None

    def run_sparse(
        self,
        step: Step,
        layer: torch.nn.Module,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        output: torch.Tensor,
    ) -> list[SparseChunk]:
        """Sparse attention for every chunk of the step.

        Args:
            step: names the chunks.
            layer: vLLM's attention layer, which holds the scales of FP8.
            query, output: [num_tokens, num_heads, head_size], in the model's dtype; queries may be FP8.
            kv_cache: [num_blocks, num_kv_heads, block_size, 2 * head_size], any strides, in the model's dtype or, for
                FP8, as bytes.
            block_table: [num_reqs, max_blocks] int32.

        Returns:
            The chunks for which sparse attention failed: they must run dense.
        """
        failed = []
        for rows in step.chunks:
            make_chunk = partial(self.chunk, rows, layer, query, kv_cache, block_table, output)
            if self.runtime.is_broken or not self.runtime.run(make_chunk, self.layer_state):
                failed.append(rows)
                self.runtime.failed.add(rows.request)
        return failed

    def chunk(
        self,
        rows: SparseChunk,
        layer: torch.nn.Module,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        block_table: torch.Tensor,
        output: torch.Tensor,
    ) -> Chunk:
        """One request's rows of the step. For the arguments see run_sparse."""
        span = slice(rows.query_start, rows.query_start + rows.num_rows)
        k, v = self.keys_and_values(kv_cache)
        q_scale, k_scale, v_scale = self.scales(layer, query)
        kv = PagedKV(k, v, block_table, rows.request, k_scale, v_scale)
        out, may_end = output[span], rows.may_end_prompt
        return Chunk(query[span], out, kv, rows.context_len, self.scale, q_scale, self.sinks, may_end)

    def keys_and_values(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The two halves of the cache. vLLM passes an FP8 cache as bytes, so it is viewed as FP8 first."""
        return (kv_cache.view(FP8) if self.shape.has_fp8_kv else kv_cache).split(self.head_size, dim=-1)

    def scales(self, layer: torch.nn.Module, query: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The scales of queries, keys and values, see Chunk. Read for every chunk: vLLM may load new ones."""
        found = quantization.fp8_scales(layer, self.num_kv_heads) if self.shape.has_fp8_kv else None
        if found is None:
            return None, None, None
        q_scale, k_scale, v_scale = found
        return q_scale if query.dtype == FP8 else None, k_scale, v_scale


def runtime_of(vllm_config: VllmConfig, device: torch.device) -> Runtime:
    """The runtime of this engine and device. A process may hold several engines, even with the same settings.

    Layers of a draft model use the main model's runtime. They never run sparse, so no pattern file has to fit them.

    Raises:
        ConfigError: the settings, or the pattern file that they name, cannot be served.
    """
    try:
        config = load_config(vllm_config.additional_config)
        pages.require(config)
        key = (compat.engine_id(vllm_config), device, config.model_dump_json())
        runtime = _runtimes.get(key)
        if runtime is None:
            reports = compat.reports_metrics()
            if reports and (wrong := misplaced(vllm_config.additional_config)):
                logger.warning("MInference: %s", wrong)
            model = compat.served_model(vllm_config) if isinstance(config.method, AutoSettings) else None
            pipeline = compat.pipeline(vllm_config)
            _runtimes[key] = runtime = Runtime(config, device, reports, model, pipeline)
    except ConfigError as error:
        raise refused(str(error)) from None
    return runtime


def refused(why: str) -> ConfigError:
    """Log why the engine must not start, and return the exception to raise."""
    # The exception appears at the end of a worker's long traceback; this line is what the user should read.
    logger.error("MInference cannot start: %s", why)
    return ConfigError(why)


class MInferenceImpl(SparseLayerMixin, FlashAttentionImpl):
    """FlashAttention with sparse prefill."""

    WINDOW_OFF = (-1, -1)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attach_runtime(torch.device("cuda", torch.cuda.current_device()))

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
        """See FlashAttentionImpl.forward. Rows that do not run sparse run there, exactly as without the plugin."""
        # Every dense step comes through here once per layer, so this must be cheap: one attribute look-up, and no
        # super(), which would double the cost.
        step: Step | None = getattr(attn_metadata, "minference", None)
        if step is None or attn_metadata is None or self._stays_dense(output_scale, output_block_scale):
            if attn_metadata is None:
                self.decide()
            return FlashAttentionImpl.forward(
                self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        for run, metadata in step.dense_runs:
            self._run_dense(layer, query, key, value, kv_cache, run, metadata, output)
        for chunk in self.run_sparse(step, layer, query, kv_cache, attn_metadata.block_table, output):
            run = DenseRun.of_chunk(chunk)
            self._run_dense(layer, query, key, value, kv_cache, run, run_metadata(run, attn_metadata), output)
        if self.is_last_sparse:
            self.runtime.finish_step(step.record)
        return output

    def _run_dense(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        run: DenseRun,
        metadata: FlashAttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        """FlashAttention for some requests of the step; `metadata` describes them as a batch of their own."""
        rows = slice(run.query_start, run.query_end)
        FlashAttentionImpl.forward(self, layer, query[rows], key, value, kv_cache, metadata, output[rows])

    def _stays_dense(self, *scales: torch.Tensor | None) -> bool:
        """Whether this layer runs dense even in a step in which others go sparse."""
        is_fused = any(scale is not None for scale in scales)  # FlashAttention refuses a quantized output
        return is_fused or self.dense_reason is not None or torch.cuda.is_current_stream_capturing()
