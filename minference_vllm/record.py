# SPDX-License-Identifier: Apache-2.0
"""What is recorded of a step, so that another thread can count it later."""

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
        layer_reason: why none of the layers may run sparse; None if some may.
        step_reason: why the step's chunks run dense even if they pass the gate; None if nothing forbids them to run
            sparse.
        failed: requests whose sparse attention raised an exception in some layer, so that their rows ran dense there.
        is_finished: whether the last sparse layer has run. It runs again in models that run their layers in loops.
    """

    group: str
    starts: Any
    seq_lens: Any
    is_prefilling: Any
    layer_reason: Reason | None = None
    step_reason: Reason | None = None
    failed: set[int] = field(default_factory=set)
    is_finished: bool = False

    def tally(self, config: MInferenceConfig, budget: Budget = UNLIMITED, before: Reason = Reason.SHORT_CHUNK) -> Tally:
        """Count prefill tokens, chunks (requests' shares of the step) and requests; decode rows are not prefill.

        A request is counted in the step that reads the end of its prompt, under the reason of its chunk in that step.
        If this last chunk is short but its context alone reaches min_seq_len, it is the remainder that the scheduler or
        the prefix cache left of a prompt that has passed the gate: the request is then counted under `before`.

        Args:
            config: the gate.
            budget: the scheduler's limits, which tell the prompts that end in this step from those that are cut.
            before: the reason under which chunks that passed the gate in earlier steps were counted.
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
        """Replace tensors by lists: the next step overwrites the tensors."""
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
    """The reason under which chunks that passed the gate in a step are counted; None if no chunk passed it."""
    kept_out = (Reason.BELOW_MIN_SEQ_LEN, Reason.SHORT_CHUNK)
    return next(
        (Reason(reason) for (_, reason), (_, chunks, _) in tally.items() if chunks and reason not in kept_out), None
    )


def faults_of(tally: Tally) -> Tally:
    """A tally's tokens and chunks that a fault made dense. Its requests are counted by the stage that counts prompts.

    A pipeline stage counts these even if another stage counts the prompts: only the stage itself knows of its faults.
    """
    fault = "dense", Reason.SPARSE_FAULT.value
    return {label: (tokens, chunks, 0) for label, (tokens, chunks, _) in tally.items() if label == fault}


@dataclass(slots=True)
class UntoldStep:
    """A step whose requests cannot be told apart on the host: all its tokens count as one dense chunk of no request.

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
