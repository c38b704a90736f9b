# SPDX-License-Identifier: Apache-2.0
"""The metadata builders: once a step, from host data, they attach what runs sparse to vLLM's own metadata."""

import dataclasses
import logging
import math
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata, FlashAttentionMetadataBuilder

from minference_vllm import compat
from minference_vllm.group import LayerGroup
from minference_vllm.plan import ALL_DENSE, DenseRun, Plan, Reason, Requests, SparseChunk, Step, make_plan

logger = logging.getLogger("vllm.minference")


class PlanningMixin:
    """Planning, for a builder of whatever vLLM backend. Expects vLLM's AttentionMetadataBuilder beside it."""

    def attach_layers(self, vllm_config: VllmConfig, layer_names: list[str], kv_cache_spec: Any) -> None:
        """Tell each layer of the group what only the builder knows of it."""
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        impls = [layer.impl for layer in layers.values()]
        for name, layer in layers.items():
            layer.impl.settle(_late_reason(name, layer, vllm_config, kv_cache_spec))
        sparse = [impl for impl in impls if impl.dense_reason is None]
        self._runtime = impls[0].runtime
        self._layers = LayerGroup(impls, self._runtime)
        self._min_seq_len, self._min_chunk = self._runtime.config.min_seq_len, self._runtime.config.min_chunk
        self._group = layer_names[0]
        self._has_sparse_layers = bool(sparse)
        self._dense_reason = None if sparse else impls[0].dense_reason  # of the whole group
        self._runtime.join(self._has_sparse_layers)
        self._defer = self._runtime.counters.defer
        for impl in sparse:
            impl.warm_up(kv_cache_spec.block_size)
        for reason in {impl.dense_reason for impl in impls} - {None}:
            count = sum(impl.dense_reason is reason for impl in impls)
            logger.info("MInference: %d of %d layers always run dense (%s)", count, len(impls), reason.value)

    def plan_step(self, common: CommonAttentionMetadata, metadata: Any) -> Plan:
        """Plan one step, and have it counted."""
        # vLLM empties the CPU's caches between two steps. What counts then is how much code and data this touches: a
        # frame, `super` or a field of the configuration costs a microsecond and more, a named tuple four; asking a
        # tensor for its length, or NumPy for a view of it, more than a copy.
        if common.max_query_len == 1:
            return ALL_DENSE
        # If any layers may go sparse, the groups that have such layers speak for the model.
        runtime = self._runtime
        counts = runtime.publish and self._has_sparse_layers is runtime.has_sparse_layers
        if common.max_seq_len >= self._min_seq_len:
            return self._plan_long(common, metadata, counts)
        if counts and common.is_prefilling is not None:
            is_prefilling = common.is_prefilling.tolist()
            if True in is_prefilling:  # else drafts are to be verified
                self._defer((self._group, common.query_start_loc_cpu.tolist(), [], is_prefilling, self._dense_reason))
        return ALL_DENSE

    def _plan_long(self, common: CommonAttentionMetadata, metadata: Any, counts: bool) -> Plan:
        """Plan a step that holds a request as long as the gate asks for."""
        plan, may_pass = ALL_DENSE, common.max_query_len >= self._min_chunk
        if (counts or may_pass) and (fields := self._copied(common)):
            if may_pass:
                requests = fields = Requests(*fields)
                plan = make_plan(requests, self._runtime.config)
                if plan.chunks and (reason := compat.step_dense_reason(common, metadata)):
                    fields, plan = requests._replace(step_reason=reason), ALL_DENSE
            if counts:
                self._defer((self._group, *fields))
        return plan

    def _copied(self, common: CommonAttentionMetadata) -> tuple[Any, ...] | None:
        """The fields of the step's Requests; None if none of them reads a prompt."""
        # Another group's layers, which may go sparse, may take this group's metadata over: update_block_table.
        reason = None if self._runtime.has_sparse_layers else self._dense_reason
        bounds, num_reqs = common.seq_lens_cpu_upper_bound, common.num_reqs
        if common.is_prefilling is None:
            return self._unknown(common, reason)
        is_prefilling = common.is_prefilling.tolist()
        if True not in is_prefilling:
            return None
        if bounds is None or len(seq_lens := bounds.tolist()[:num_reqs]) < num_reqs:
            return self._unknown(common, reason)
        return common.query_start_loc_cpu.tolist(), seq_lens, is_prefilling, reason

    def _unknown(self, common: CommonAttentionMetadata, reason: Reason | None) -> Requests | None:
        """A step whose rows cannot be told apart, if one of its chunks is long enough to have gone sparse."""
        if common.max_query_len < self._min_chunk:
            return None
        return Requests.unknown(common.num_actual_tokens, reason or Reason.NO_HOST_METADATA)


class MInferenceBuilder(PlanningMixin, FlashAttentionMetadataBuilder):
    """FlashAttention's builder, with a plan."""

    # A full CUDA graph may hold a uniform decode batch, never one in which a chunk could go sparse.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.attach_layers(vllm_config, layer_names, kv_cache_spec)
        self._is_capturing = False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> FlashAttentionMetadata:
        metadata = FlashAttentionMetadataBuilder.build(
            self, common_prefix_len, common_attn_metadata, fast_build, **kwargs
        )
        if fast_build or self._is_capturing:  # fast_build: the draft model's steps
            return metadata
        plan = self.plan_step(common_attn_metadata, metadata)
        if plan is not ALL_DENSE:
            metadata.minference = _step(plan.chunks, plan.dense_runs, metadata)
            self._layers.open_step()
        elif self._layers.is_in:  # after the server's start, or a step that was broken off
            self._layers.step_aside()
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> FlashAttentionMetadata:
        # By way of self.build: vLLM derives builders from this one, for cross attention say, that change there what is
        # attended to.
        self._is_capturing = True
        try:
            return super().build_for_cudagraph_capture(common_attn_metadata)
        finally:
            self._is_capturing = False

    def update_block_table(
        self, metadata: FlashAttentionMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> FlashAttentionMetadata:
        updated = super().update_block_table(metadata, blk_table, slot_mapping)
        step: Step | None = getattr(metadata, "minference", None)
        if step is not None:
            updated.minference = _step(step.chunks, tuple(run for run, _ in step.dense_runs), updated)
            self._layers.open_step()
        elif self._layers.is_in:
            self._layers.step_aside()
        return updated


def _step(chunks: tuple[SparseChunk, ...], dense_runs: tuple[DenseRun, ...], metadata: FlashAttentionMetadata) -> Step:
    """What the layers go by."""
    return Step(chunks, tuple((run, _run_metadata(run, metadata)) for run in dense_runs))


def _run_metadata(run: DenseRun, metadata: FlashAttentionMetadata) -> FlashAttentionMetadata:
    """Metadata of a run of dense requests as a batch of their own."""
    return dataclasses.replace(
        metadata,
        num_actual_tokens=run.query_end - run.query_start,
        max_query_len=run.max_query_len,
        query_start_loc=metadata.query_start_loc[run.first : run.end + 1] - run.query_start,
        max_seq_len=run.max_seq_len,
        seq_lens=metadata.seq_lens[run.first : run.end],
        block_table=metadata.block_table[run.first : run.end],
        slot_mapping=metadata.slot_mapping[run.query_start : run.query_end],
        # FlashAttention-3's schedule was made for the whole batch.
        scheduler_metadata=None,
        max_num_splits=0,
    )


def _late_reason(name: str, layer: Attention, vllm_config: VllmConfig, kv_cache_spec: Any) -> Reason | None:
    """Why a layer stays dense, as far as its place in the model and its cache tell."""
    index = compat.layer_index(name)
    num_layers = getattr(vllm_config.model_config.hf_text_config, "num_hidden_layers", math.inf)
    if getattr(layer, "is_draft_layer", False) or (index is not None and index >= num_layers):
        return Reason.DRAFT_LAYER
    if index is not None and index < layer.impl.runtime.config.dense_layers:
        return Reason.DENSE_LAYER
    # vLLM cuts such a layer's requests into a batch of its own, without flags or lengths of whole prompts.
    if getattr(layer, "attention_chunk_size", None):
        return Reason.CHUNKED_LOCAL
    if kv_cache_spec.dtype != vllm_config.model_config.dtype:
        return Reason.DTYPE
    return None
