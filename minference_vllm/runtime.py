# SPDX-License-Identifier: Apache-2.0
"""What the layers of one worker process share: configuration, method, scratch memory and counters."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from minference_vllm import debug
from minference_vllm.attention import Chooser, Guard, LayerState, choose, prefill
from minference_vllm.budget import Budget, gate_obstacle, sharing_obstacle
from minference_vllm.chunk import Chunk, PagedKV
from minference_vllm.config import MInferenceConfig
from minference_vllm.faults import Faults
from minference_vllm.index import TILE
from minference_vllm.methods import make_method
from minference_vllm.metrics.account import Account
from minference_vllm.metrics.counters import Counters
from minference_vllm.ops import choose_kernel, report_shape
from minference_vllm.patterns import ServedModel, resolve
from minference_vllm.pipeline import ONE_STAGE, Pipeline
from minference_vllm.recall import Floors
from minference_vllm.record import StepRecord
from minference_vllm.repeats import Repeats
from minference_vllm.scratch import AttendBuffers, RecallBuffers, RecallTotals, ScratchShape, num_bytes

logger = logging.getLogger("vllm.minference")


class Runtime:
    """What the layers of one engine on one device share, in a worker process.

    Args:
        config: the resolved configuration.
        device: where the model runs.
        publish: whether this worker counts and reports metrics for its pipeline stage. Every worker reports its faults.
        model: what is served; only the method "auto" needs to know.
        pipeline: the engine's pipeline stages, and which of them this worker runs.

    Attributes:
        resolved: what the setting `method` resolves to.
        dense_layers: layers of the whole model that always run dense, by the settings or a pattern file.
        chooser: chooses the keys of each chunk; see attention.Chooser.
        floors: the guard's.
        counts_prompts: whether this worker counts the prompts, for all pipeline stages.
        faults: counts and logs exceptions.
        failed: requests of this step whose sparse attention raised an exception.
        has_sparse_layers: whether any layer may run sparse.
    """

    def __init__(
        self,
        config: MInferenceConfig,
        device: torch.device,
        publish: bool,
        model: ServedModel | None = None,
        pipeline: Pipeline = ONE_STAGE,
    ) -> None:
        self.config = config
        self.publish = publish
        self.device = device
        self.resolved = resolve(config.method, model)
        self.method = make_method(self.resolved.settings, choose_kernel(config.kernel, device))
        self.dense_layers = frozenset(range(config.dense_layers)) | self.resolved.dense_layers
        self.counts_prompts = publish and pipeline.speaks(self.dense_layers)
        self.chooser: Chooser = choose
        self.faults = Faults(raises=config.debug)
        engine = self.resolved.settings.name, self.method.kernel.value
        self.account = Account(config, device, publish, self.counts_prompts, engine, self.faults)
        self.counters = Counters(config.log_every, self.account.tally, self.account.read)
        self.floors = Floors(config.recall_floor, config.row_recall_floor)
        self.failed: set[int] = set()
        self._repeats = Repeats()
        self._has_looked_at_limits = False
        self.has_sparse_layers = False
        self._buffers: dict[ScratchShape, tuple[Any, AttendBuffers, RecallBuffers | None]] = {}
        self._layers: dict[tuple[ScratchShape, int, int], LayerState] = {}
        self._warm: set[tuple[ScratchShape, int]] = set()
        if self.counts_prompts:  # the others would log the same
            logger.info("MInference: %s", config.without_folders())
            if self.resolved.why:
                logger.info("MInference: %s.", self.resolved.why)

    @property
    def is_broken(self) -> bool:
        """Whether the sparse path is given up: all runs dense until the next start."""
        return self.faults.is_broken

    def start(self, max_prompt: int, budget: Budget, has_sparse_layers: bool) -> None:
        """A metadata builder is ready: count from now on, and warn if the server's limits keep the gate shut.

        Args:
            max_prompt: tokens of the longest prompt that the server admits.
            budget: of its scheduler.
            has_sparse_layers: whether layers of this builder may run sparse.
        """
        self.has_sparse_layers |= has_sparse_layers
        self.account.budget = budget
        self.counters.start()
        if self.counts_prompts and has_sparse_layers and not self._has_looked_at_limits:
            self._has_looked_at_limits = True
            if obstacle := gate_obstacle(self.config, max_prompt, budget):
                logger.warning("MInference: nothing will run sparse: %s.", obstacle)
            elif obstacle := sharing_obstacle(self.config, budget):
                logger.warning("MInference: a prompt will hardly run sparse beside other requests: %s.", obstacle)

    def layer_state(
        self, shape: ScratchShape, position: int, num_layers: int, index: int | None = None, number: int | None = None
    ) -> LayerState:
        """The state of a layer. Its scratch is claimed on the first call, in the profiling run.

        Args:
            shape: of its scratch.
            position, num_layers: the layer's place among the plugin's layers on this worker, and how many these are.
            index: its number in the whole model, by which a pattern file knows it; None if it has none.
            number: the number by which log and metrics name the layer; its position if not given.

        Raises:
            ConfigError: the pattern file does not fit the layer.
        """
        key = shape, position, num_layers
        if key not in self._layers:
            # vLLM calls this in inference mode. Tensors made in that mode could not be written outside of it, where
            # they are used too.
            number = position if number is None else number
            with torch.inference_mode(False):
                buffers, attend, recall = self._claim(shape)
                guard = None
                if recall:
                    totals = self.account.recall_totals(shape, position, num_layers, number)
                    guard = Guard(self.floors, recall, totals)
                budgets = self._budgets(shape, index)
            self._layers[key] = LayerState(position, budgets, buffers, attend, guard, number)
        return self._layers[key]

    def _budgets(self, shape: ScratchShape, index: int | None) -> torch.Tensor:
        """What each head of a layer keeps."""
        budgets = self.method.budgets(shape.num_qo_heads, self.device)
        if self.resolved.pattern is not None:
            budgets.copy_(torch.tensor(self.resolved.pattern.budgets(index, shape.num_qo_heads)))
        return budgets

    def _claim(self, shape: ScratchShape) -> tuple[Any, AttendBuffers, RecallBuffers | None]:
        """The scratch for all layers of this shape."""
        if shape not in self._buffers:
            buffers = self.method.scratch(shape, self.device)
            attend = AttendBuffers.allocate(shape.num_qo_heads, shape.max_chunk, self.device)
            recall = RecallBuffers.allocate(shape.num_qo_heads, self.device) if self.config.measure_recall else None
            attend = replace(attend, kept_pairs=self.account.kept_pairs(attend.kept_pairs))
            size = sum(map(num_bytes, filter(None, (buffers, attend, recall))))
            self.account.scratch_bytes += size
            logger.info("MInference: %.0f MiB of scratch for %s", size / 2**20, shape)
            report_shape(self.method.kernel, self.config.kernel, shape)
            self._buffers[shape] = buffers, attend, recall
        return self._buffers[shape]

    def run(self, make_chunk: Callable[[], Chunk], layer: LayerState) -> bool:
        """Sparse attention of one layer for one chunk.

        Args:
            make_chunk: makes the chunk; an exception that it raises is handled as any other fault.
            layer: whose budgets and scratch are used.

        Returns:
            Whether it succeeded; if not, the chunk's output is undefined.
        """
        try:
            chunk = make_chunk()
            self._attend(chunk, layer)
        except Exception as error:
            self.faults.in_layer(error, layer.number)
            return False
        self.faults.end_row()
        self.account.causal_pairs += chunk.num_qo_heads * chunk.causal_pairs
        return True

    def _attend(self, chunk: Chunk, layer: LayerState) -> None:
        """Sparse attention of a chunk, timed now and then, checked if `debug` is on."""
        lap = self.account.stopwatch.begin() if self.publish else None
        if lap is None and not self.config.debug:
            self._repeats.prefill(chunk, self.method, layer, self.chooser)
            return
        chooser = debug.checking(self.chooser) if self.config.debug else self.chooser
        prefill(chunk, self.method, layer, lap.timing(chooser) if lap else chooser)
        if lap:
            self.account.stopwatch.end(lap)
        if self.config.debug:
            debug.check_output(chunk, layer)

    def finish_step(self, record: StepRecord) -> None:
        """After the last sparse layer: have the step counted, and its measurements copied behind the GPU's kernels."""
        record.failed, self.failed = record.failed | self.failed, set()
        self._repeats.forget()
        if self.publish:
            if not record.is_finished:
                record.is_finished = True
                self.counters.defer(record)
            self.account.collect()

    def warm_up(self, shape: ScratchShape, page_size: int) -> None:
        """Compile every kernel that layers of this shape will need, before the first request.

        If they cannot run here, everything runs dense. Only if memory does not suffice does the server refuse to start,
        as anywhere else in vLLM's start.

        Raises:
            torch.OutOfMemoryError: there is too little memory.
        """
        if (shape, page_size) in self._warm or self.device.type != "cuda" or self.is_broken:
            return
        self._warm.add((shape, page_size))
        try:
            self.dry_run(shape, page_size)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.faults.in_start(error)

    def dry_run(self, shape: ScratchShape, page_size: int) -> None:
        """Run sparse attention over made-up keys, for each length of Method.prompt_lengths. Metrics do not count it."""
        for length in self.method.prompt_lengths(shape):
            self._dry_prefill(shape, page_size, length)

    def _dry_prefill(self, shape: ScratchShape, page_size: int, length: int) -> None:
        cache = torch.zeros(
            (1, page_size, shape.num_kv_heads, 2 * shape.head_dim), dtype=shape.kv_dtype, device=self.device
        )
        k, v = cache.transpose(1, 2).split(shape.head_dim, dim=-1)
        # The cache has one page, and the block table names it as each page of the request.
        table = torch.zeros(1, -(-length // page_size), dtype=torch.int32, device=self.device)
        rows = min(2 * TILE, length, shape.max_chunk)
        q = torch.zeros(rows, shape.num_qo_heads, shape.head_dim, dtype=shape.q_dtype, device=self.device)
        one = torch.ones(shape.num_kv_heads, dtype=torch.float32, device=self.device)
        of_cache, of_queries = one if shape.has_fp8_kv else None, one if shape.has_fp8_q else None
        kv = PagedKV(k, v, table, 0, of_cache, of_cache)
        sinks = None
        if shape.sinks_dtype is not None:
            sinks = torch.zeros(shape.num_qo_heads, dtype=shape.sinks_dtype, device=self.device)
        chunk = Chunk(q, torch.empty_like(q, dtype=shape.dtype), kv, length - rows, 1.0, of_queries, sinks, False)
        buffers, attend, recall = self._claim(shape)
        budgets = self.method.budgets(shape.num_qo_heads, self.device)
        attend = replace(attend, kept_pairs=torch.zeros_like(attend.kept_pairs))
        totals = RecallTotals.allocate(1, shape.num_qo_heads, self.device)
        guard = Guard(self.floors, recall, totals) if recall else None
        prefill(chunk, self.method, LayerState(0, budgets, buffers, attend, guard))
