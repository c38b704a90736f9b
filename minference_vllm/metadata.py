# SPDX-License-Identifier: Apache-2.0
"""The metadata builders: once per step they plan from host data what runs sparse, and attach it to vLLM's metadata."""

import contextlib
import logging
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata, FlashAttentionMetadataBuilder

from minference_vllm.compat import limits, pages, steps
from minference_vllm.errors import ConfigError
from minference_vllm.impl import refused
from minference_vllm.plan import ALL_DENSE, Plan, Requests, make_plan
from minference_vllm.reason import Reason
from minference_vllm.record import StepRecord, UntoldStep
from minference_vllm.step import Step

BELOW_THE_GATE: list[int] = []  # stands for the lengths of requests that are all below the gate

logger = logging.getLogger("vllm.minference")


class PlanningMixin:
    """Planning, for the builder of any vLLM backend. The other base class must be vLLM's AttentionMetadataBuilder."""

    def attach_layers(self, vllm_config: VllmConfig, layer_names: list[str], kv_cache_spec: Any) -> None:
        """Decide which layers may run sparse, and prepare those of this KV cache group for their first request.

        Raises:
            ConfigError: see SparseLayerMixin.decide; or the setting page_salt has no effect on this engine.
        """
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        impls = [layer.impl for layer in layers.values()]
        try:
            pages.require_noted(impls[0].runtime.config, vllm_config)
        except ConfigError as error:
            raise refused(str(error)) from None
        for impl in impls:
            impl.decide()
        sparse = [impl for impl in impls if impl.dense_reason is None]
        for impl in sparse:
            impl.runtime.warm_up(impl.shape, kv_cache_spec.block_size)
        self._runtime = runtime = impls[0].runtime
        self._min_seq_len, self._min_chunk = runtime.config.min_seq_len, runtime.config.min_chunk
        self._budget = limits.budget(vllm_config)
        self._group = layer_names[0]
        self._has_sparse_layers = bool(sparse)
        self._dense_reason = None if sparse else impls[0].dense_reason  # of the whole group
        self._pools_blocks = steps.pools_blocks(self)
        runtime.start(limits.longest_prompt(vllm_config), self._budget, bool(sparse))
        self._defer = runtime.counters.defer
        self._are_overwritten = not steps.has_host_tensors_of_its_own(vllm_config)

    def attach_plan(self, common: CommonAttentionMetadata, metadata: Any) -> None:
        """Plan one step, and attach to its metadata what runs sparse. After an exception the step stays dense."""
        if self._pools_blocks:  # its rows are not tokens of a prompt, and may be too many for the scratch
            return
        try:
            plan, record = self.plan_step(common, metadata)
            if record is not None:
                metadata.minference = self.make_step(plan, record, metadata)
        except Exception as error:
            self._runtime.faults.in_plan(error)
            self._count_fault(common)

    def make_step(self, plan: Plan, record: StepRecord, metadata: Any) -> Step:
        """What tells the layers about a plan."""
        return Step.of(plan, record, metadata)

    def plan_step(self, common: CommonAttentionMetadata, metadata: Any) -> tuple[Plan, StepRecord | None]:
        """Plan one step. A dense step is counted now, any other by the last sparse layer.

        Returns:
            The plan, and the record to count once its chunks have run; None if the whole step is dense.
        """
        # This runs between two steps of the GPU, when the CPU's caches are cold: its time depends on the memory that it
        # touches, not on what it computes. So of a step below the gate it keeps references to vLLM's arrays only, and
        # another thread reads them.
        if common.max_query_len == 1:
            return ALL_DENSE, None
        is_long = common.max_seq_len >= self._min_seq_len
        if is_long and common.max_query_len >= self._min_chunk:
            return self._plan_long(common, metadata)
        seq_lens = common.seq_lens_cpu_upper_bound if is_long else BELOW_THE_GATE
        if self._counts and common.is_prefilling is not None and seq_lens is not None:
            record = StepRecord(
                self._group, common.query_start_loc_cpu, seq_lens, common.is_prefilling, self._dense_reason
            )
            if self._are_overwritten:
                record.copy_fields()
            self._defer(record)
        return ALL_DENSE, None

    @property
    def _counts(self) -> bool:
        """Whether this group's steps are counted: if any group has sparse layers, only those of such groups are."""
        return self._runtime.publish and self._has_sparse_layers is self._runtime.has_sparse_layers

    def _plan_long(self, common: CommonAttentionMetadata, metadata: Any) -> tuple[Plan, StepRecord | None]:
        """Plan a step in which some chunk may pass the gate."""
        # A group whose layers are all dense makes a plan too if another group has sparse layers: vLLM may give that
        # group this group's metadata, with another block table (update_block_table).
        reason = None if self._runtime.has_sparse_layers else self._dense_reason
        fault = Reason.SPARSE_FAULT if self._runtime.is_broken else None
        requests, untold = _requests(common)
        if requests is None:
            if untold and self._counts:
                self._defer(
                    UntoldStep(self._group, common.num_actual_tokens, fault or reason or Reason.NO_HOST_METADATA)
                )
            return ALL_DENSE, None
        plan = ALL_DENSE if reason or fault else make_plan(requests, self._runtime.config, self._budget)
        record = StepRecord(self._group, *requests, reason, fault)
        if plan.chunks:
            record.step_reason = steps.step_traits(common, metadata).dense_reason
            if record.step_reason is None:
                return plan, record
        if self._counts:
            self._defer(record)
        return ALL_DENSE, None

    def _count_fault(self, common: CommonAttentionMetadata) -> None:
        """Count a step that could not be planned: chunks that pass the gate ran dense for that reason."""
        # If vLLM's metadata lacks something, this may fail as planning did. That fault is logged already.
        with contextlib.suppress(Exception):
            record = StepRecord(
                self._group, common.query_start_loc_cpu, common.seq_lens_cpu_upper_bound, common.is_prefilling,
                self._dense_reason, Reason.SPARSE_FAULT,
            )  # fmt: skip
            record.copy_fields()
            if self._counts:
                self._defer(record)


def _requests(common: CommonAttentionMetadata) -> tuple[Requests | None, bool]:
    """The step's requests, and whether they cannot be told apart.

    The requests are None if none of them reads its prompt, and also if the data on the host does not tell them
    apart.
    """
    bounds, num_reqs = common.seq_lens_cpu_upper_bound, common.num_reqs
    if common.is_prefilling is None:
        return None, True
    is_prefilling = common.is_prefilling.tolist()
    if True not in is_prefilling:
        return None, False
    if bounds is None or len(seq_lens := bounds.tolist()[:num_reqs]) < num_reqs:
        return None, True
    return Requests(common.query_start_loc_cpu.tolist(), seq_lens, is_prefilling), False


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
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        if fast_build or self._is_capturing:  # fast_build: the draft model's steps
            return metadata
        self.attach_plan(common_attn_metadata, metadata)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> FlashAttentionMetadata:
        # A flag, because vLLM's method calls self.build, and must: vLLM derives builders from this class (for cross
        # attention, for example) that override it to change what is attended to.
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
            updated.minference = self._step_on(updated, step)
        return updated

    def _step_on(self, metadata: FlashAttentionMetadata, step: Step) -> Step:
        """The step on this group's metadata. After an exception all of it runs dense here."""
        try:
            return step.on(metadata)
        except Exception as error:
            self._runtime.faults.in_plan(error)
            self._runtime.failed.update(chunk.request for chunk in step.chunks)
            return step.all_dense(metadata)
