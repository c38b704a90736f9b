# SPDX-License-Identifier: Apache-2.0
"""What a step leaves to be counted, by another thread and later."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from minference_vllm.budget import Budget
from minference_vllm.config import MInferenceConfig
from minference_vllm.plan import Requests, cut_prompts, gate
from minference_vllm.reason import Reason

Tally = dict[tuple[str, str], tuple[int, int, int]]
"""Tokens, chunks and requests by path and reason."""

UNLIMITED = Budget(math.inf, math.inf)


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

    def tally(self, config: MInferenceConfig, budget: Budget = UNLIMITED, before: Reason = Reason.SHORT_CHUNK) -> Tally:
        """Prefill tokens, chunks (requests' shares of the step) and requests; decode rows are not prefill.

        A request counts in the step that reads the end of its prompt, by its chunk there. A chunk that is short but has
        the gate behind it is what the scheduler, or the prefix cache, left of a prompt that passed, and counts as that.

        Args:
            config: the gate.
            budget: by what the scheduler cuts prompts, which tells those that end.
            before: why what passed the gate before this step ran where it ran.
        """
        counts: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
        requests = self._requests()
        cut = cut_prompts(requests, budget)
        for request, rows, seq_len in requests.prompts():
            reason = self._reason(request, rows, seq_len, config)
            of_chunk = counts[_label(reason)]
            of_chunk[0] += rows
            of_chunk[1] += 1
            if request not in cut:
                is_rest = reason is Reason.SHORT_CHUNK and seq_len - rows >= config.min_seq_len
                counts[_label(before if is_rest else reason)][2] += 1
        return {label: (tokens, chunks, requests) for label, (tokens, chunks, requests) in counts.items()}

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


def _label(reason: Reason) -> tuple[str, str]:
    return "sparse" if reason is Reason.GATE_OPEN else "dense", reason.value


def reason_of_passed(tally: Tally) -> Reason | None:
    """Why what passed the gate in a step ran where it ran; None if nothing did."""
    kept_out = (Reason.BELOW_MIN_SEQ_LEN, Reason.SHORT_CHUNK)
    return next(
        (Reason(reason) for (_, reason), (_, chunks, _) in tally.items() if chunks and reason not in kept_out), None
    )


def faults_of(tally: Tally) -> Tally:
    """What of it a fault made dense, tokens and chunks; its requests are counted where the prompts are.

    A pipeline stage counts this even where another counts the prompts, for only the stage itself knows of its faults.
    """
    fault = "dense", Reason.SPARSE_FAULT.value
    return {label: (tokens, chunks, 0) for label, (tokens, chunks, _) in tally.items() if label == fault}


@dataclass(slots=True)
class UntoldStep:
    """A step whose requests cannot be told apart on the host: all its tokens count as one dense chunk, of no request.

    Attributes:
        group: the KV cache group whose builder planned the step.
        num_tokens: query rows of the step.
        reason: why it ran dense.
    """

    group: str
    num_tokens: int
    reason: Reason

    def tally(self, *_: Any) -> Tally:
        return {_label(self.reason): (self.num_tokens, 1, 0)}


Record = StepRecord | UntoldStep
