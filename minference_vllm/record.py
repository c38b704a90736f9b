# SPDX-License-Identifier: Apache-2.0
"""What a step leaves to be counted, by another thread and later."""

from dataclasses import dataclass, field
from typing import Any

from minference_vllm.config import MInferenceConfig
from minference_vllm.plan import Requests, gate
from minference_vllm.reason import Reason

Tally = dict[tuple[str, str], tuple[int, int]]
"""Tokens and chunks by path and reason."""


@dataclass(slots=True)
class StepRecord:
    """A step whose requests are known.

    Attributes:
        group: the KV cache group whose builder planned the step.
        starts, seq_lens, is_prefilling: see Requests; lists, or host tensors that no later step overwrites.
        layer_reason: what about the layers forbids sparse attention.
        step_reason: what about the step forbids it to chunks that pass the gate.
        failed: requests whose sparse attention raised an exception in some layer, so that their rows ran dense there.
    """

    group: str
    starts: Any
    seq_lens: Any
    is_prefilling: Any
    layer_reason: Reason | None = None
    step_reason: Reason | None = None
    failed: set[int] = field(default_factory=set)

    def tally(self, config: MInferenceConfig) -> Tally:
        """Prefill tokens and chunks (requests' shares of the step); decode rows are not prefill."""
        counts: Tally = {}
        for request, rows, seq_len in self._requests().prompts():
            reason = self._reason(request, rows, seq_len, config)
            label = "sparse" if reason is Reason.GATE_OPEN else "dense", reason.value
            tokens, chunks = counts.get(label, (0, 0))
            counts[label] = tokens + rows, chunks + 1
        return counts

    def copy_fields(self) -> None:
        """Have lists in place of tensors that the next step overwrites."""
        self.starts, self.seq_lens, self.is_prefilling = self._requests()

    def _requests(self) -> Requests:
        fields = (self.starts, self.seq_lens, self.is_prefilling)
        return Requests(*(value if isinstance(value, list) else value.tolist() for value in fields))

    def _reason(self, request: int, rows: int, seq_len: int, config: MInferenceConfig) -> Reason:
        if self.layer_reason is not None:
            return self.layer_reason
        if request in self.failed:
            return Reason.SPARSE_FAULT
        reason = gate(rows, seq_len, config)
        return self.step_reason or reason if reason is Reason.GATE_OPEN else reason


def faults_of(tally: Tally) -> Tally:
    """What of it a fault made dense.

    A pipeline stage counts this even where another counts the prompts, for only the stage itself knows of its faults.
    """
    return {label: counts for label, counts in tally.items() if label == ("dense", Reason.SPARSE_FAULT.value)}


@dataclass(slots=True)
class UntoldStep:
    """A step whose requests cannot be told apart on the host: all its tokens count as one dense chunk.

    Attributes:
        group: the KV cache group whose builder planned the step.
        num_tokens: query rows of the step.
        reason: why it ran dense.
    """

    group: str
    num_tokens: int
    reason: Reason

    def tally(self, config: MInferenceConfig) -> Tally:
        return {("dense", self.reason.value): (self.num_tokens, 1)}


Record = StepRecord | UntoldStep
