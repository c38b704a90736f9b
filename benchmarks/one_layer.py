# SPDX-License-Identifier: Apache-2.0
"""One attention layer of vLLM's without a model or a server: its backend, metadata builder and cache are called as
vLLM's runner calls them."""

import tempfile
from typing import Any

import torch

from benchmarks import SPARSE_BACKEND
from benchmarks.batches import KV_SCALES, Batch, Inputs, Shape
from benchmarks.made_up import write_model

NAME = "model.layers.0.self_attn.attn"
ALL_BITS = 0xFF
"""A byte which, when it is repeated, is NaN in bf16, fp16, float32 and FP8 (e4m3) alike."""


def init_worker(device: torch.device) -> None:
    """Make this process the only worker of a group, as vLLM's layers expect, and register our backend's name."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from vllm.platforms import current_platform

    from minference_vllm import plugin

    plugin.register()
    backend = current_platform.dist_backend if device.type == "cuda" else "gloo"
    with tempfile.NamedTemporaryFile(prefix="rendezvous-", delete=False) as meeting:
        method = f"file://{meeting.name}"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, method, 0, backend)
        initialize_model_parallel(1, 1)


class OneLayer:
    """A layer of a backend, alone in its model.

    Args:
        backend: as in --attention-backend.
        shape: of the layer and its cache.
        limits: the most rows of a step (--max-num-batched-tokens) and the longest request (--max-model-len).
        settings: the plugin's; only for its own backend.
    """

    def __init__(
        self,
        backend: str,
        shape: Shape,
        limits: tuple[int, int],
        device: torch.device,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.shape, self._device = shape, device
        self._config = _make_config(backend, shape, limits, settings)
        self._make_layer()

    def _make_layer(self) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.layers.attention import Attention
        from vllm.utils.torch_utils import set_default_torch_dtype

        shape, config = self.shape, self._config
        with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype), self._device:
            self.layer = Attention(
                shape.num_qo_heads, shape.head_dim, shape.head_dim**-0.5, shape.num_kv_heads,
                cache_config=config.cache_config, prefix=NAME,
            )  # fmt: skip
            if shape.is_fp8:
                for name, scale in KV_SCALES.items():
                    getattr(self.layer, name).fill_(scale)
                    setattr(self.layer, f"{name}_float", scale)
            self._spec = self.layer.get_kv_cache_spec(config)
            builder = self.layer.get_attn_backend().get_builder_cls()
            self._builder = builder(self._spec, [NAME], config, self._device)

    @property
    def has_fp8_queries(self) -> bool:
        """Whether vLLM hands this layer its queries in FP8."""
        return self.layer.query_quant is not None

    def run(self, batch: Batch, inputs: Inputs) -> torch.Tensor:
        """[num_rows, num_qo_heads, head_dim]: the layer's output for a step; NaN where it writes nothing."""
        cache, slots = self._fill_cache(batch, inputs), self._slots_of_rows(batch, inputs)
        metadata = self._builder.build(0, self._common(batch, inputs, slots))
        q, k, v = self._project(batch, inputs)
        if self.layer.query_quant is not None:
            q, _ = self.layer.query_quant(q, self.layer._q_scale)
        q, k, v = (x.view(len(x), -1, self.shape.head_dim) for x in (q, k, v))
        output = torch.full(inputs.q.shape, torch.nan, dtype=inputs.q.dtype, device=self._device)
        with torch.inference_mode():
            self.layer.impl.do_kv_cache_update(self.layer, k, v, cache, slots)
            self.layer.impl.forward(self.layer, q, k, v, cache, metadata, output=output)
        return output

    def _project(self, batch: Batch, inputs: Inputs) -> tuple[torch.Tensor, ...]:
        """Query, key and value of the step's rows, [num_rows, heads * head_dim]: views of one tensor, as in a model."""
        new = [
            torch.cat([of[-request.rows :] for of, request in zip(all_of, batch.requests, strict=True)])
            for all_of in (inputs.k, inputs.v)
        ]
        packed = torch.cat([inputs.q, *new], dim=1).flatten(1)
        widths = [heads * self.shape.head_dim for heads in self._heads]
        return packed.split(widths, dim=1)

    @property
    def _heads(self) -> tuple[int, int, int]:
        return self.shape.num_qo_heads, self.shape.num_kv_heads, self.shape.num_kv_heads

    def _fill_cache(self, batch: Batch, inputs: Inputs) -> torch.Tensor:
        """[num_pages, num_kv_heads, page_size, 2 * head_dim]: the requests' contexts, and NaN everywhere else."""
        shape, dtype = self.shape, self._spec.dtype
        size = inputs.num_pages, shape.page_size, shape.num_kv_heads, 2 * shape.head_dim
        if shape.layout == "HND":
            size = size[0], size[2], size[1], size[3]
        raw = torch.full((*size[:3], size[3] * dtype.itemsize), ALL_BITS, dtype=torch.uint8, device=self._device)
        cache = raw.view(dtype) if shape.layout == "HND" else raw.view(dtype).transpose(1, 2)
        for number, request in enumerate(batch.requests):
            if request.context_len:
                keys, values = inputs.k[number][: request.context_len], inputs.v[number][: request.context_len]
                slots = inputs.slots(number, 0, request.context_len, shape.page_size)
                self.layer.impl.do_kv_cache_update(self.layer, keys, values, cache, slots)
        return cache

    def _slots_of_rows(self, batch: Batch, inputs: Inputs) -> torch.Tensor:
        """[num_rows] int64: the cache slots into which the step's own keys are to be written."""
        return torch.cat(
            [
                inputs.slots(number, request.context_len, request.seq_len, self.shape.page_size)
                for number, request in enumerate(batch.requests)
            ]
        )

    def _common(self, batch: Batch, inputs: Inputs, slots: torch.Tensor) -> Any:
        """The step as vLLM's runner describes it to builders."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        starts = torch.tensor(batch.starts, dtype=torch.int32)
        seq_lens = torch.tensor([request.seq_len for request in batch.requests], dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts.to(self._device),
            query_start_loc_cpu=starts,
            seq_lens=seq_lens.to(self._device),
            num_reqs=len(batch.requests),
            num_actual_tokens=batch.starts[-1],
            max_query_len=max(request.rows for request in batch.requests),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=inputs.block_table,
            slot_mapping=slots,
            is_prefilling=torch.tensor([request.is_prompt for request in batch.requests]),
            seq_lens_cpu_upper_bound=seq_lens,
        )


def _make_config(backend: str, shape: Shape, limits: tuple[int, int], settings: dict[str, Any] | None) -> Any:
    """The VllmConfig of a server with these options."""
    from vllm.engine.arg_utils import EngineArgs

    sizes = {
        "hidden_size": shape.num_qo_heads * shape.head_dim, "intermediate_size": 64, "vocab_size": 64,
        "num_attention_heads": shape.num_qo_heads, "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
    }  # fmt: skip
    max_rows, max_len = limits
    with tempfile.TemporaryDirectory(prefix="model-") as directory:
        write_model(directory, sizes, 1, max_len)
        return EngineArgs(
            model=directory, load_format="dummy", skip_tokenizer_init=True, dtype=shape.dtype, max_model_len=max_len,
            max_num_batched_tokens=max_rows, max_num_seqs=64, kv_cache_dtype=shape.cache, block_size=shape.page_size,
            enforce_eager=True, enable_prefix_caching=False, attention_backend=backend,
            additional_config={"minference": settings} if backend == SPARSE_BACKEND else {},
        ).create_engine_config()  # fmt: skip
