# SPDX-License-Identifier: Apache-2.0
"""What the scheduler gives a step and its requests, and whether the gate can open under that."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from minference_vllm.config import MInferenceConfig

DECODING = 64
"""Rows of a step that are left for requests that decode beside a prompt."""


class Budget(NamedTuple):
    """By what the scheduler cuts prompts into chunks; infinite where that is not known.

    Attributes:
        tokens: most of a step (--max-num-batched-tokens).
        rows: most of one request in a step, if there are others (--long-prefill-token-threshold); vLLM gives a request
            that is alone the whole step.
        slots: tokens of a step that each request takes beside its rows, for what a draft model adds to them.
        scheduled: most rows of a step, where fewer are to fill it (--max-num-scheduled-tokens).
        grain: keys of which every chunk but a prompt's last ends at a multiple, where vLLM caches the state of layers
            without keys there; 1 elsewhere.
    """

    tokens: float
    rows: float
    slots: int = 0
    scheduled: float = math.inf
    grain: int = 1

    @property
    def alone(self) -> tuple[float, str]:
        """Most rows of a request that is alone, and the option that says so."""
        whole = self.tokens - self.slots, "--max-num-batched-tokens"
        return min(whole, (self.scheduled, "--max-num-scheduled-tokens"))

    def is_spent(self, starts: Sequence[int]) -> bool:
        """Whether nothing more would have fitted into a step.

        Args:
            starts: the first query row of each request, and the number of rows.
        """
        taken = self.slots * sum(after > start for start, after in pairwise(starts)) if self.slots else 0
        return starts[-1] >= self.scheduled or starts[-1] + taken >= self.tokens

    def is_cut(self, rows: int, seq_len: int) -> bool:
        """Whether a prompt goes on after these rows, as far as they tell, whatever else is in the step.

        Args:
            rows: of the request in the step.
            seq_len: its keys, the rows included; 0 if not known.
        """
        ends_on_grain = self.grain > 1 and seq_len > 0 and seq_len % self.grain == 0
        return rows == self.rows or ends_on_grain


def gate_obstacle(config: MInferenceConfig, max_prompt: float, budget: Budget) -> str:
    """Why the gate can never open on a server with these limits; empty if it can.

    Args:
        config: the gate.
        max_prompt: tokens of the longest prompt that the server admits.
        budget: of its scheduler.
    """
    admitted = max_prompt, "tokens that a prompt may have (--max-model-len)"
    rows, option = budget.alone
    in_a_step = rows, f"rows that a step may give a request ({option})"
    limits = (("min_chunk", *min(admitted, in_a_step)), ("min_seq_len", *admitted))
    obstacles = (
        f"minference.{setting} is {value}, above the {limit} {name}"
        for setting, limit, name in limits
        if (value := getattr(config, setting)) > limit
    )
    return "; ".join(obstacles)


def sharing_obstacle(config: MInferenceConfig, budget: Budget) -> str:
    """Why the gate opens for a request that is alone, and hardly while there are others; empty if it does."""
    rows, option = budget.alone
    beside = rows - DECODING
    if config.min_chunk > budget.rows:
        limit = f"{budget.rows} rows that a step gives a request beside others (--long-prefill-token-threshold)"
    elif config.min_chunk > beside:
        limit = f"{beside} rows that a step of {rows} ({option}) leaves a request beside {DECODING} that decode"
    else:
        return ""
    return f"minference.min_chunk is {config.min_chunk}, above the {limit}"
