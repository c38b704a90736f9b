# SPDX-License-Identifier: Apache-2.0
"""The backend that vLLM sees without a GPU: the same plan, selection and index, attention in plain torch.

Pages hold key and value side by side, as on a GPU: vLLM's CPU kernels pack them otherwise, so this backend writes and
reads the cache itself. Layers that can never go sparse are left to vLLM's CPU kernels altogether.
"""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from minference_vllm.impl import SparseLayerMixin
from minference_vllm.index import PagedKV
from minference_vllm.metadata import PlanningMixin
from minference_vllm.plan import Reason, Step
from minference_vllm.reference.dense import dense

# With these a layer's rows are attended to as usual, only never sparsely: our own dense attention serves it.
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
        chunks = () if fast_build else self.plan_step(common_attn_metadata, metadata).chunks
        if chunks:
            metadata.minference = Step(chunks, ())
            self._layers.open_step()
        return metadata


class MInferenceCPUImpl(SparseLayerMixin, CPUAttentionBackendImpl):
    """Attention over pages of plain keys and values, in torch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.join_runtime(torch.device("cpu"), window_off=-1)
        self._is_stock = self.dense_reason not in PLAIN_DENSE

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
        # [num_tokens, num_kv_heads, 2 * head_size]
        rows = torch.cat([key, value], dim=-1)[: len(slot_mapping)]
        real = slot_mapping >= 0  # padding has no slot
        slots = slot_mapping[real]
        kv_cache[slots // page_size, :, slots % page_size] = rows[real].to(kv_cache.dtype)

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
            self.claim_scratch()
            return output
        if self._is_stock or output_scale is not None or output_block_scale is not None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        if not attn_metadata.causal:
            raise NotImplementedError("MInference on a CPU serves causal attention only: choose vLLM's CPU_ATTN.")
        step: Step | None = getattr(attn_metadata, "minference", None)
        chunks = step.chunks if step is not None and self.dense_reason is None else ()
        self._run_dense({chunk.request for chunk in chunks}, query, kv_cache, attn_metadata, output)
        if chunks:
            self.run_sparse(Step(chunks, ()), query, kv_cache, attn_metadata.block_table, output)
        return output

    def _run_dense(
        self,
        sparse_requests: set[int],
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: CPUAttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        k, v = kv_cache.split(self.head_size, dim=-1)
        starts, seq_lens = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        for request, seq_len in enumerate(seq_lens):
            rows = slice(starts[request], starts[request + 1])
            if request not in sparse_requests and rows.stop > rows.start:
                kv = PagedKV(k, v, metadata.block_table, request)
                dense(query[rows], kv, seq_len - (rows.stop - rows.start), self.scale, output[rows])
