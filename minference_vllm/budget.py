# SPDX-License-Identifier: Apache-2.0
"""The scheduler's limits for a step and its requests, and whether the gate can open within them."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from minference_vllm.config import MInferenceConfig

DECODING = 64
"""How many rows of a step are assumed to go to requests that decode beside a prompt."""


class Budget(NamedTuple):
    """The limits by which the scheduler cuts prompts into chunks; infinite if they are not known.

    Attributes:
        tokens: most tokens of a step (--max-num-batched-tokens).
        rows: most rows of one request in a step, if there are others (--long-prefill-token-threshold); vLLM gives the
            whole step to a request that is alone.
        slots: tokens that each request takes from the step in addition to its rows, for what a draft model adds to
            them.
        scheduled: most rows of a step, if that is less than `tokens` (--max-num-scheduled-tokens); else infinite.
        grain: every chunk but a prompt's last ends at a multiple of this many keys, if vLLM caches the states of layers
            that have no keys (Mamba) at these places; else 1.
    """

    tokens: float
    rows: float
    slots: int = 0
    scheduled: float = math.inf
    grain: int = 1

    @property
    def alone(self) -> tuple[float, str]:
        """Most rows of a request that is alone in a step, and the option that sets this limit."""
        whole = self.tokens - self.slots, "--max-num-batched-tokens"
        return min(whole, (self.scheduled, "--max-num-scheduled-tokens"))

    def is_spent(self, starts: Sequence[int]) -> bool:
        """Whether a step is full.

        Args:
            starts: the first query row of each request, then the number of all rows.
        """
        taken = self.slots * sum(after > start for start, after in pairwise(starts)) if self.slots else 0
        return starts[-1] >= self.scheduled or starts[-1] + taken >= self.tokens

    def is_cut(self, rows: int, seq_len: int) -> bool:
        """Whether a prompt goes on after these rows, judged by them alone and not by what else is in the step.

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
    """Why the gate opens for a request alone in a step but hardly beside others; empty if it opens there too."""
    rows, option = budget.alone
    beside = rows - DECODING
    if config.min_chunk > budget.rows:
        limit = f"{budget.rows} rows that a step gives a request beside others (--long-prefill-token-threshold)"
    elif config.min_chunk > beside:
        limit = f"{beside} rows that a step of {rows} ({option}) leaves a request beside {DECODING} that decode"
    else:
        return ""
    return f"minference.min_chunk is {config.min_chunk}, above the {limit}"
