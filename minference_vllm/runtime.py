# SPDX-License-Identifier: Apache-2.0
"""What the layers of one worker process share: configuration, method, scratch memory and counters."""

import itertools
import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from minference_vllm import debug
from minference_vllm.attention import Chooser, Guard, LayerState, choose, prefill
from minference_vllm.chunk import Chunk, PagedKV
from minference_vllm.config import MInferenceConfig
from minference_vllm.index import TILE
from minference_vllm.methods import make_method
from minference_vllm.metrics.counters import Counters
from minference_vllm.metrics.density import DensityMeter
from minference_vllm.metrics.recall_meter import RecallMeter
from minference_vllm.metrics.snapshot import Counts, Times
from minference_vllm.metrics.stopwatch import Stopwatch
from minference_vllm.ops import choose_kernel, report_shape
from minference_vllm.patterns import ServedModel, resolve
from minference_vllm.pipeline import ONE_STAGE, Pipeline
from minference_vllm.plan import gate_obstacle
from minference_vllm.recall import Floors, Recall
from minference_vllm.record import Record, StepRecord, Tally, faults_of
from minference_vllm.scratch import AttendBuffers, RecallBuffers, RecallTotals, ScratchShape, num_bytes

MOST_FAULTS = 3
"""Faults of the sparse path, one after the other, after which it is not tried again."""

logger = logging.getLogger("vllm.minference")


class Runtime:
    """One a worker process, device and configuration.

    Args:
        config: the resolved configuration.
        device: where the model runs.
        publish: whether this worker counts, and reports metrics for its pipeline stage.
        model: what is served; only the method "auto" needs to know.
        pipeline: this worker's place in it.

    Attributes:
        resolved: what the setting `method` comes to.
        dense_layers: layers of the whole model that always run dense, by the settings or a pattern file.
        chooser: who chooses the keys of each chunk; see attention.Chooser.
        floors: of the guard.
        counts_prompts: whether prompts are counted here, for all stages.
        is_broken: whether the sparse path has failed so often that all runs dense until the next start.
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
        self.model = model
        self.resolved = resolve(config.method, model)
        self.method = make_method(self.resolved.settings, choose_kernel(config.kernel, device))
        self.dense_layers = frozenset(range(config.dense_layers)) | self.resolved.dense_layers
        self.counts_prompts = publish and pipeline.speaks(self.dense_layers)
        self.chooser: Chooser = choose
        self.counters = Counters(publish, config.log_every, self._tally_once, self._read)
        self.floors = Floors(config.recall_floor, config.row_recall_floor)
        self.is_broken = False
        self.failed: set[int] = set()  # requests of this step whose sparse attention raised an exception
        self._faults = 0  # since a chunk last ran sparse
        self._has_logged_fault = False
        self._has_warned = False
        self.has_sparse_layers = False
        self._counted: set[str] = set()
        self._causal_pairs = self._scratch_bytes = 0
        self._stopwatch = Stopwatch(device)
        # With the first scratch: what a layer's constructor allocates, vLLM's sleep mode drops with the weights.
        self._density: DensityMeter | None = None
        self._recalls: dict[tuple[ScratchShape, int], tuple[RecallTotals, RecallMeter]] = {}
        self._buffers: dict[ScratchShape, tuple[Any, AttendBuffers, RecallBuffers | None]] = {}
        self._layers: dict[tuple[ScratchShape, int, int], LayerState] = {}
        self._warm: set[tuple[ScratchShape, int]] = set()
        if self.counts_prompts:  # every rank has the same
            logger.info("MInference: %s", config)
            if self.resolved.why:
                logger.info("MInference: %s.", self.resolved.why)

    def start(self, max_seq_len: int, max_chunk: int, has_sparse_layers: bool) -> None:
        """A metadata builder is ready: count from now on, and warn if the gate can never open.

        Args:
            max_seq_len: tokens of the longest request that the server admits.
            max_chunk: most rows that its scheduler gives a request in one step.
            has_sparse_layers: whether layers of this builder may run sparse.
        """
        self.has_sparse_layers |= has_sparse_layers
        self.counters.start()
        may_warn = self.counts_prompts and has_sparse_layers and not self._has_warned
        if may_warn and (obstacle := gate_obstacle(self.config, max_seq_len, max_chunk)):
            self._has_warned = True
            logger.warning("MInference: nothing will run sparse: %s.", obstacle)

    def layer_state(
        self, shape: ScratchShape, position: int, num_layers: int, index: int | None = None, number: int | None = None
    ) -> LayerState:
        """What a layer brings to its chunks; claimed when first asked for, in the profiling run.

        Args:
            shape: of its scratch.
            position, num_layers: its place among the plugin's layers on this worker, and how many they are.
            index: its number in the whole model, by which a pattern file knows it; None if it has none.
            number: by which log and metrics name it; its position if not given.

        Raises:
            ConfigError: the pattern file does not fit the layer.
        """
        key = shape, position, num_layers
        if key not in self._layers:
            # Claimed inside vLLM's inference mode, but used outside it too, where its tensors could not be written.
            with torch.inference_mode(False):
                buffers, attend, recall = self._claim(shape)
                guard = Guard(self.floors, recall, self._totals(shape, num_layers)) if recall else None
                budgets = self._budgets(shape, index)
            number = position if number is None else number
            self._layers[key] = LayerState(position, budgets, buffers, attend, guard, number)
        return self._layers[key]

    def _budgets(self, shape: ScratchShape, index: int | None) -> torch.Tensor:
        """What each head of a layer keeps."""
        budgets = self.method.budgets(shape.num_qo_heads, self.device)
        if self.resolved.pattern is not None:
            budgets.copy_(torch.tensor(self.resolved.pattern.budgets(index, shape.num_qo_heads)))
        return budgets

    def _totals(self, shape: ScratchShape, num_layers: int) -> RecallTotals:
        """What is measured of all layers of this shape."""
        if (shape, num_layers) not in self._recalls:
            totals = RecallTotals.allocate(num_layers, shape.num_qo_heads, self.device)
            self._recalls[shape, num_layers] = totals, RecallMeter(totals)
        return self._recalls[shape, num_layers][0]

    def _claim(self, shape: ScratchShape) -> tuple[Any, AttendBuffers, RecallBuffers | None]:
        """The scratch for all layers of this shape."""
        if shape not in self._buffers:
            buffers = self.method.scratch(shape, self.device)
            attend = AttendBuffers.allocate(shape.num_qo_heads, shape.max_chunk, self.device)
            recall = RecallBuffers.allocate(shape.num_qo_heads, self.device) if self.config.measure_recall else None
            self._density = self._density or DensityMeter(attend.kept_pairs)
            size = sum(map(num_bytes, filter(None, (buffers, attend, recall))))
            self._scratch_bytes += size
            logger.info("MInference: %.0f MiB of scratch for %s", size / 2**20, shape)
            report_shape(self.method.kernel, self.config.kernel, shape)
            self._buffers[shape] = buffers, replace(attend, kept_pairs=self._density.kept_pairs), recall
        return self._buffers[shape]

    def run(
        self,
        q: torch.Tensor,
        out: torch.Tensor,
        kv: PagedKV,
        context_len: int,
        scale: float,
        layer: LayerState,
        q_scale: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        may_end_prompt: bool = True,
    ) -> bool:
        """Sparse attention of one layer for one chunk; arguments as Chunk's.

        Returns:
            Whether it could be done; if not, `out` is undefined.
        """
        try:
            chunk = Chunk(q, out, kv, context_len, scale, q_scale, sinks, may_end_prompt)
            lap = self._stopwatch.begin() if self.publish else None
            index = prefill(chunk, self.method, layer, lap.timing(self.chooser) if lap else self.chooser)
            if lap:
                self._stopwatch.end(lap)
            if self.config.debug:
                debug.check(chunk, index, layer)
        except Exception:
            if self.config.debug:
                raise
            self._report_fault(layer.number)
            return False
        self._faults = 0
        self._causal_pairs += chunk.num_qo_heads * chunk.causal_pairs
        return True

    def _report_fault(self, number: int) -> None:
        """Count an exception of the sparse path; the first since the start is logged with its traceback."""
        self._faults += 1
        if not self._has_logged_fault:
            self._has_logged_fault = True
            logger.exception("MInference: sparse attention failed in layer %d; its rows run dense.", number)
        if self._faults == MOST_FAULTS:
            self.is_broken = True
            logger.error(
                "MInference: sparse attention failed %d times in a row. All runs dense until the server is started "
                'again. The setting "debug": true raises the exception instead.',
                MOST_FAULTS,
            )

    def finish_step(self, record: StepRecord) -> None:
        """The last sparse layer has run: have the step counted, and copy what was kept from the GPU, in its time."""
        record.failed, self.failed = self.failed, set()
        if self.publish:
            self.counters.defer(record)
            if self._density:
                self._density.copy(self._causal_pairs)
            for _, meter in self._recalls.values():
                meter.copy()
            self._stopwatch.collect()

    def _tally_once(self, record: Record) -> Tally:
        """What to count of a step's prefill: all of it once, though every KV cache group plans it.

        Called by the counters, in the order of the steps, by one thread at a time. A group plans a step (or each of its
        micro-batches) once, so a group that comes again begins the next one; the first group of a step is counted.
        """
        if record.group in self._counted:
            self._counted.clear()
        self._counted.add(record.group)
        tally = record.tally(self.config) if len(self._counted) == 1 else {}
        return tally if self.counts_prompts else faults_of(tally)

    def _read(self) -> tuple[int, int, Recall, int, Counts, Times]:
        """What a Snapshot holds beside tokens and chunks, of all sparse attention since start.

        Pairs and recall are those whose copies have arrived, times those that the GPU had told at the end of a step.
        """
        pairs = self._density.read() if self._density else (0, 0)
        recall = sum(itertools.starmap(self._measured, list(self._recalls)), start=Recall())
        engine = self.resolved.settings.name, self.method.kernel.value
        return *pairs, recall, self._scratch_bytes, Counter({engine: 1}), self._stopwatch.total

    def _measured(self, shape: ScratchShape, num_layers: int) -> Recall:
        """Recall of the layers of this shape, by their numbers."""
        recall = self._recalls[shape, num_layers][1].read()
        layers = {self._layers[shape, at, num_layers].number: layer for at, layer in recall.layers.items()}
        return replace(recall, layers=layers)

    def warm_up(self, shape: ScratchShape, page_size: int) -> None:
        """Compile every kernel that layers of this shape will need, before the first request."""
        if (shape, page_size) not in self._warm and self.device.type == "cuda":
            self._warm.add((shape, page_size))
            self.dry_run(shape, page_size)

    def dry_run(self, shape: ScratchShape, page_size: int) -> None:
        """Sparse attention over made-up keys, at the end of each prompt that runs other kernels; it is not counted."""
        for length in self.method.prompt_lengths(shape):
            self._dry_prefill(shape, page_size, length)

    def _dry_prefill(self, shape: ScratchShape, page_size: int, length: int) -> None:
        cache = torch.zeros(
            (1, page_size, shape.num_kv_heads, 2 * shape.head_dim), dtype=shape.kv_dtype, device=self.device
        )
        k, v = cache.transpose(1, 2).split(shape.head_dim, dim=-1)
        # All of the request's pages are the one that there is.
        table = torch.zeros(1, -(-length // page_size), dtype=torch.int32, device=self.device)
        rows = min(2 * TILE, length, shape.max_chunk)
        q = torch.zeros(rows, shape.num_qo_heads, shape.head_dim, dtype=shape.q_dtype, device=self.device)
        one = torch.ones(shape.num_kv_heads, device=self.device)
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
