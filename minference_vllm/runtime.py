# SPDX-License-Identifier: Apache-2.0
"""What the layers of one worker process share: configuration, code, scratch memory and counters."""

import logging
from dataclasses import replace
from typing import Any

import torch

from minference_vllm.attention import sparse_prefill
from minference_vllm.config import MInferenceConfig
from minference_vllm.engine import load_engine
from minference_vllm.index import TILE, PagedKV
from minference_vllm.metrics.counters import Counters, Tally
from minference_vllm.metrics.density import DensityMeter
from minference_vllm.plan import Requests, SparseChunk, tally
from minference_vllm.workspace import Geometry, Workspace

logger = logging.getLogger("vllm.minference")


class Runtime:
    """One a worker process and device.

    Args:
        config: the resolved configuration.
        device: where the model runs.
        publish: whether this worker counts, and reports metrics for its engine.
    """

    def __init__(self, config: MInferenceConfig, device: torch.device, publish: bool) -> None:
        self.config = config
        self.publish = publish
        self.device = device
        self.engine = load_engine(config, device)
        self.counters = Counters(publish, config.log_every, self.tally_once, self.read_density)
        self.has_sparse_layers = False
        self._counted: set[str] = set()
        self._causal_pairs = 0
        # With the first scratch: what a layer's constructor allocates, vLLM's sleep mode drops with the weights.
        self._density: DensityMeter | None = None
        self._workspaces: dict[Geometry, Workspace] = {}
        self._warm: set[tuple[object, ...]] = set()
        if publish:  # every rank has the same
            logger.info("MInference: %s", config)

    def workspace(self, geometry: Geometry) -> Workspace:
        """The scratch for layers of this geometry, claimed when first asked for: in the profiling run."""
        if geometry not in self._workspaces:
            # Claimed inside vLLM's inference mode, but used outside it too, where its tensors could not be written.
            with torch.inference_mode(False):
                workspace = Workspace.allocate(geometry, self.device)
                self._density = self._density or DensityMeter(workspace.kept_pairs)
            logger.info("MInference: %.0f MiB of scratch for %s", workspace.num_bytes / 2**20, geometry)
            self._workspaces[geometry] = replace(workspace, kept_pairs=self._density.kept_pairs)
        return self._workspaces[geometry]

    def run(
        self, q: torch.Tensor, kv: PagedKV, chunk: SparseChunk, scale: float, geometry: Geometry, out: torch.Tensor
    ) -> None:
        """Sparse attention of one layer for one chunk; q and out are the whole step's."""
        rows = slice(chunk.query_start, chunk.query_start + chunk.num_rows)
        ws = self.workspace(geometry)
        self._causal_pairs += geometry.num_qo_heads * chunk.causal_pairs
        sparse_prefill(q[rows], kv, chunk.context_len, scale, self.config, self.engine, ws, out[rows])

    def join(self, has_sparse_layers: bool) -> None:
        """A metadata builder's layers may go sparse, or may not. Called before it counts."""
        self.has_sparse_layers |= has_sparse_layers
        self.counters.start()

    def tally_once(self, group: str, *fields: Any) -> Tally:
        """What to count of a step's prefill: all of it once, though every KV cache group plans it.

        Called by the counters, in the order of the steps, by one thread at a time.

        Args:
            group: whose builder planned it.
            fields: of the step's Requests, or tensors in their place.
        """
        return tally(Requests(*map(to_list, fields)), self.config) if self._opens_step(group) else {}

    def copy_density(self) -> None:
        """Have copied from the GPU, in its time, what the sparse kernels kept. Called once they are enqueued."""
        if self.publish and self._density:
            self._density.copy(self._causal_pairs)

    def read_density(self) -> tuple[int, int]:
        """Kept and causal pairs of all sparse attention since start whose copy has arrived. Called by the counters."""
        return self._density.read() if self._density else (0, 0)

    def _opens_step(self, group: str) -> bool:
        """Whether this is a first group of a step or micro-batch. Each comes once; one that returns opens the next."""
        if group in self._counted:
            self._counted.clear()
        self._counted.add(group)
        return len(self._counted) == 1

    def warm_up(self, num_kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype, geometry: Geometry) -> None:
        """Compile every kernel this geometry will need, before the first request."""
        variant = (num_kv_heads, head_dim, page_size, dtype, geometry)
        if variant not in self._warm and self.device.type == "cuda":
            self._warm.add(variant)
            self.dry_run(*variant)

    def dry_run(self, num_kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype, geometry: Geometry) -> None:
        """Sparse attention over two tiles of made-up keys; it is not counted."""
        rows = min(2 * TILE, geometry.max_seq_len, geometry.max_chunk)
        pages = -(-rows // page_size)
        shape = (pages, page_size, num_kv_heads, 2 * head_dim)
        k, v = torch.zeros(shape, dtype=dtype, device=self.device).transpose(1, 2).split(head_dim, dim=-1)
        table = torch.arange(pages, dtype=torch.int32, device=self.device)[None]
        q = torch.zeros(rows, geometry.num_qo_heads, head_dim, dtype=dtype, device=self.device)
        kv = PagedKV(k, v, table, 0)
        ws = self.workspace(geometry)
        ws = replace(ws, kept_pairs=torch.zeros_like(ws.kept_pairs))
        sparse_prefill(q, kv, 0, 1.0, self.config, self.engine, ws, torch.empty_like(q))


def to_list(value: Any) -> Any:
    """A tensor's values, or what is none as it is."""
    return value.tolist() if isinstance(value, torch.Tensor) else value
