# SPDX-License-Identifier: Apache-2.0
"""What one engine did on this worker since its start, for its Counters to tally and to read."""

import itertools
from collections import Counter
from dataclasses import replace

import torch

from minference_vllm.config import MInferenceConfig
from minference_vllm.faults import Faults
from minference_vllm.metrics.density import DensityMeter
from minference_vllm.metrics.recall_meter import RecallMeter
from minference_vllm.metrics.snapshot import Snapshot
from minference_vllm.metrics.stopwatch import Stopwatch
from minference_vllm.reason import Reason
from minference_vllm.recall import Recall
from minference_vllm.record import UNLIMITED, Record, Tally, faults_of, reason_of_passed
from minference_vllm.scratch import RecallTotals, ScratchShape


class Account:
    """Counts of one engine on this worker, and the way of its measurements from the device.

    The thread that publishes keeps this object until the process ends, which may be long after the engine has ended. It
    must therefore refer neither to layers nor to their scratch.

    Args:
        config: the resolved configuration.
        device: where the model runs.
        publish: whether this worker reports for its pipeline stage; other workers report their faults only.
        counts_prompts: whether prompts are counted here, for all stages.
        engine: names of the method and the kernels.
        faults: of the engine on this worker.

    Attributes:
        stopwatch: times some runs of the layers.
        causal_pairs: causal pairs of every sparse launch enqueued so far.
        scratch_bytes: bytes of scratch claimed so far.
        budget: the scheduler's limits; once they are known, a request is counted in the step in which its prompt ends.
    """

    def __init__(
        self,
        config: MInferenceConfig,
        device: torch.device,
        publish: bool,
        counts_prompts: bool,
        engine: tuple[str, str],
        faults: Faults,
    ) -> None:
        self._config, self._device, self._publish, self._counts_prompts = config, device, publish, counts_prompts
        self._engine, self._faults = engine, faults
        self.stopwatch = Stopwatch(device)
        self.causal_pairs = self.scratch_bytes = 0
        self.budget = UNLIMITED
        # Made with the first scratch and not here: vLLM's sleep mode drops what a layer's constructor allocates,
        # together with the weights.
        self._density: DensityMeter | None = None
        self._recalls: dict[tuple[ScratchShape, int], tuple[RecallTotals, RecallMeter]] = {}
        self._numbers: dict[tuple[ScratchShape, int, int], int] = {}
        self._is_collecting = True
        self._counted: set[str] = set()
        self._passed = Reason.SHORT_CHUNK  # counted for the last chunk that passed the gate

    def kept_pairs(self, claimed: torch.Tensor) -> torch.Tensor:
        """The device's counter of kept pairs: the first buffer that is claimed serves as the counter for all layers."""
        self._density = self._density or DensityMeter(claimed)
        return self._density.kept_pairs

    def recall_totals(self, shape: ScratchShape, position: int, num_layers: int, number: int) -> RecallTotals:
        """The recall of all layers of this shape; `number` is what the metrics call the layer at `position`."""
        self._numbers[shape, position, num_layers] = number
        if (shape, num_layers) not in self._recalls:
            totals = RecallTotals.allocate(num_layers, shape.num_qo_heads, self._device)
            self._recalls[shape, num_layers] = totals, RecallMeter(totals)
        return self._recalls[shape, num_layers][0]

    def collect(self) -> None:
        """Enqueue copies of the step's measurements from the device, behind its kernels. An exception ends this."""
        if not self._is_collecting:
            return
        try:
            if self._density:
                self._density.copy(self.causal_pairs)
            for _, meter in self._recalls.values():
                meter.copy()
            self.stopwatch.collect()
        except Exception as error:
            self._is_collecting = False
            self._faults.in_account(error)

    def tally(self, record: Record) -> Tally:
        """What to count of a step's prefill. Every KV cache group plans the step, but it must be counted once.

        The counters call this in the order of the steps, from one thread at a time. A group plans a step (or each of
        its micro-batches) once, so a group that comes again begins the next step. Only the first group of a step is
        counted.
        """
        if record.group in self._counted:
            self._counted.clear()
        self._counted.add(record.group)
        tally = record.tally(self._config, self.budget, self._passed) if len(self._counted) == 1 else {}
        self._passed = reason_of_passed(tally) or self._passed
        return tally if self._counts_prompts else faults_of(tally)

    def read(self) -> Snapshot:
        """Everything that is reported beside tokens, chunks and requests, of all sparse attention since start.

        Pairs and recall include the copies that have arrived; times include the laps that were over when a step ended.
        """
        faults = Snapshot(faults=self._faults.total, broken_ranks=int(self._faults.is_broken))
        if not self._publish:
            return faults
        kept_pairs, causal_pairs = self._density.read() if self._density else (0, 0)
        return replace(
            faults,
            kept_pairs=kept_pairs,
            causal_pairs=causal_pairs,
            recall=sum(itertools.starmap(self._measured, list(self._recalls)), start=Recall()),
            scratch_bytes=self.scratch_bytes,
            engines=Counter({self._engine: 1}),
            times=self.stopwatch.total,
        )

    def _measured(self, shape: ScratchShape, num_layers: int) -> Recall:
        """Recall of the layers of this shape, by the layers' numbers."""
        recall = self._recalls[shape, num_layers][1].read()
        layers = {self._numbers[shape, at, num_layers]: layer for at, layer in recall.layers.items()}
        return replace(recall, layers=layers)
