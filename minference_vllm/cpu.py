# SPDX-License-Identifier: Apache-2.0
"""The backend for vLLM on a CPU: plan, selection and index are the GPU's, attention runs in plain torch.

Pages hold key and value side by side, as on a GPU. vLLM's CPU kernels pack them differently, so this backend writes and
reads the cache itself. Layers whose attention differs from the ordinary (see PLAIN_DENSE) are left to vLLM's CPU
kernels altogether.
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from minference_vllm.chunk import PagedKV
from minference_vllm.compat import quantization
from minference_vllm.impl import SparseLayerMixin, refused
from minference_vllm.metadata import PlanningMixin
from minference_vllm.plan import DenseRun, Plan
from minference_vllm.reason import Reason
from minference_vllm.record import StepRecord
from minference_vllm.reference.dense import dense
from minference_vllm.reference.quantized import to_stored
from minference_vllm.step import Step

# Layers with these dense reasons, or none, have ordinary causal attention, which our own dense attention computes.
PLAIN_DENSE = (None, Reason.DENSE_LAYER, Reason.DRAFT_LAYER, Reason.KV_SHARING, Reason.HEAD_DIM, Reason.BATCH_INVARIANT)


class MInferenceCPUBackend(CPUAttentionBackend):
    """Sparse prefill on a CPU: for tests and demonstrations, not for speed."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["MInferenceCPUImpl"]:
        return MInferenceCPUImpl

    @staticmethod
    def get_builder_cls() -> type["MInferenceCPUBuilder"]:
        return MInferenceCPUBuilder


class MInferenceCPUBuilder(PlanningMixin, CPUAttentionMetadataBuilder):
    """vLLM's CPU builder, with a plan."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.attach_layers(vllm_config, layer_names, kv_cache_spec)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        if not fast_build:
            self.attach_plan(common_attn_metadata, metadata)
        return metadata

    def make_step(self, plan: Plan, record: StepRecord, metadata: CPUAttentionMetadata) -> Step:
        return Step(plan.chunks, (), record)  # the layers find the dense rows by themselves


class MInferenceCPUImpl(SparseLayerMixin, CPUAttentionBackendImpl):
    """Attention over pages of plain keys and values, in torch."""

    WINDOW_OFF = -1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attach_runtime(torch.device("cpu"))
        self._is_stock = False

    def decide(self) -> None:
        """See SparseLayerMixin. Also decides whether vLLM's kernels serve this layer: their layout of pages differs.

        Raises:
            ConfigError: neither vLLM's kernels nor our attention can serve such a cache.
        """
        super().decide()
        self._is_stock = self.dense_reason not in PLAIN_DENSE
        self._refuse_caches_of_another_type()

    def _refuse_caches_of_another_type(self) -> None:
        model = self._vllm_config.model_config
        if quantization.is_quantized(self.kv_cache_dtype):
            return
        if kv_cache_dtype_str_to_dtype(self.kv_cache_dtype, model) != model.dtype:
            raise refused(
                f"On a CPU a model in {model.dtype} cannot be served with a KV cache of {self.kv_cache_dtype!r}: give "
                "both the same type, --kv-cache-dtype auto for one."
            )

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if self._is_stock:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        page_size = kv_cache.shape[2]
        _, k_scale, v_scale = self.scales(layer, key)
        stored = [x if scale is None else to_stored(x, scale) for x, scale in ((key, k_scale), (value, v_scale))]
        # [num_tokens, num_kv_heads, 2 * head_size]
        rows = torch.cat(stored, dim=-1)[: len(slot_mapping)]
        real = slot_mapping >= 0  # padding has no slot
        slots = slot_mapping[real]
        kv_cache[slots // page_size, :, slots % page_size] = rows.view(kv_cache.dtype)[real]

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attn_metadata is None:
            self.decide()
            return output
        if self._is_stock or output_scale is not None or output_block_scale is not None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if not attn_metadata.causal:
            raise NotImplementedError("MInference on a CPU serves causal attention only: choose vLLM's CPU_ATTN.")
        step: Step | None = getattr(attn_metadata, "minference", None)
        if step is None or self.dense_reason is not None:
            self._run_dense(_requests(attn_metadata), layer, query, kv_cache, attn_metadata, output)
            return output
        failed = self.run_sparse(step, layer, query, kv_cache, attn_metadata.block_table, output)
        sparse = {chunk.request for chunk in step.chunks} - {chunk.request for chunk in failed}
        rest = [run for run in _requests(attn_metadata) if run.first not in sparse]
        self._run_dense(rest, layer, query, kv_cache, attn_metadata, output)
        if self.is_last_sparse:
            self.runtime.finish_step(step.record)
        return output

    def _run_dense(
        self,
        runs: list[DenseRun],
        layer: torch.nn.Module,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: CPUAttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        k, v = self.keys_and_values(kv_cache)
        q_scale, k_scale, v_scale = self.scales(layer, query)
        for run in runs:
            rows = slice(run.query_start, run.query_end)
            kv = PagedKV(k, v, metadata.block_table, run.first, k_scale, v_scale)
            dense(query[rows], kv, run.max_seq_len - run.max_query_len, self.scale, output[rows], q_scale, self.sinks)


def _requests(metadata: CPUAttentionMetadata) -> list[DenseRun]:
    """Each request of a step that has rows, as a run of its own."""
    starts, seq_lens = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
    return [
        DenseRun(request, request + 1, starts[request], starts[request + 1], rows, seq_len)
        for request, seq_len in enumerate(seq_lens)
        if (rows := starts[request + 1] - starts[request]) > 0
    ]
