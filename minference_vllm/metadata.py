# SPDX-License-Identifier: Apache-2.0
"""The metadata builders: once a step, from host data, they attach what runs sparse to vLLM's own metadata."""

import dataclasses
import functools
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
from minference_vllm.runtime import to_list

NO_LENGTHS: list[int] = []  # of requests that are all below the gate

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
        self._are_overwritten = not compat.has_host_tensors_of_its_own(vllm_config)
        for impl in sparse:
            impl.warm_up(kv_cache_spec.block_size)
        for reason in {impl.dense_reason for impl in impls} - {None}:
            count = sum(impl.dense_reason is reason for impl in impls)
            logger.info("MInference: %d of %d layers always run dense (%s)", count, len(impls), reason.value)

    @functools.cached_property
    def _counts(self) -> bool:
        """Whether this group speaks for the model. Asked in steps: then every builder is made, and has joined.

        If any layers may go sparse, the groups that have such layers do.
        """
        return self._runtime.publish and self._has_sparse_layers is self._runtime.has_sparse_layers

    def plan_step(self, common: CommonAttentionMetadata, metadata: Any) -> Plan:
        """Plan one step, and have it counted."""
        # vLLM empties the CPU's caches between two steps. What counts then is how much code and data this touches: a
        # frame, `super`, another object's field cost a microsecond and more, a named tuple four, a tensor's first
        # method five.
        if common.max_query_len == 1:
            return ALL_DENSE
        is_long = common.max_seq_len >= self._min_seq_len
        if is_long and common.max_query_len >= self._min_chunk:
            return self._plan_long(common, metadata)
        seq_lens = common.seq_lens_cpu_upper_bound if is_long else NO_LENGTHS
        if self._counts and common.is_prefilling is not None and seq_lens is not None:
            fields = common.query_start_loc_cpu, seq_lens, common.is_prefilling
            if self._are_overwritten:
                fields = tuple(map(to_list, fields))
            self._defer((self._group, *fields, self._dense_reason))
        return ALL_DENSE

    def _plan_long(self, common: CommonAttentionMetadata, metadata: Any) -> Plan:
        """Plan a step in which some chunk may pass the gate."""
        # Another group's layers, which may go sparse, may take this group's metadata over: update_block_table.
        reason = None if self._runtime.has_sparse_layers else self._dense_reason
        requests, plan = self._copied(common, reason), ALL_DENSE
        if requests is not None:
            plan = make_plan(requests, self._runtime.config)
            if plan.chunks and (step_reason := compat.step_dense_reason(common, metadata)):
                requests, plan = requests._replace(step_reason=step_reason), ALL_DENSE
            if self._counts:
                self._defer((self._group, *requests))
        return plan

    def _copied(self, common: CommonAttentionMetadata, reason: Reason | None) -> Requests | None:
        """The step's requests; None if none of them reads a prompt."""
        bounds, num_reqs = common.seq_lens_cpu_upper_bound, common.num_reqs
        unknown = Requests.unknown(common.num_actual_tokens, reason or Reason.NO_HOST_METADATA)
        if common.is_prefilling is None:
            return unknown
        is_prefilling = common.is_prefilling.tolist()
        if True not in is_prefilling:
            return None
        if bounds is None or len(seq_lens := bounds.tolist()[:num_reqs]) < num_reqs:
            return unknown
        return Requests(common.query_start_loc_cpu.tolist(), seq_lens, is_prefilling, reason)


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
        self._flash_build = super().build

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **kwargs: Any,
    ) -> FlashAttentionMetadata:
        metadata = self._flash_build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
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
