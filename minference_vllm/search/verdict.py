# SPDX-License-Identifier: Apache-2.0
"""Whether a searched file is better than the default, on prompts that it was not searched with."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SEVERAL = 2.0
"""Standard errors on each side of a mean that count as noise."""

DEARER = 1.02
"""Most that a file may cost on other prompts, relative to the default. Up to here it is noise of clock and texts."""

LEAST = 1e-6  # nats: a divergence below this is rounding

MOST = math.log(10)
"""A prompt counts as ten times better or worse at the most. A single one that is a hundred times better would make the
mean so uncertain that the file looked no better."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The file and the default on the same prompts.

    Attributes:
        default_kl, file_kl: divergence of the next tokens from dense attention's, for each prompt.
        default_cost, file_cost: cost of the attention of all layers, over all prompts.
        unit: of the costs.
    """

    default_kl: Sequence[float]
    file_kl: Sequence[float]
    default_cost: float
    file_cost: float
    unit: str

    @property
    def is_better(self) -> bool:
        """Whether the file diverges less and costs no more, beyond noise."""
        return self.diverges_less and not self.costs_more

    @property
    def diverges_less(self) -> bool:
        return self.interval[1] < 1

    @property
    def costs_more(self) -> bool:
        return self.cost_ratio > DEARER

    @property
    def interval(self) -> tuple[float, float]:
        """Of a prompt's divergence, file / default: around the geometric mean, because prompts differ by factors."""
        logs = [
            max(-MOST, min(MOST, math.log(max(new, LEAST) / max(old, LEAST))))
            for new, old in zip(self.file_kl, self.default_kl, strict=True)
        ]
        mean, spread = statistics.fmean(logs), SEVERAL * statistics.stdev(logs) / len(logs) ** 0.5
        return math.exp(mean - spread), math.exp(mean + spread)

    @property
    def cost_ratio(self) -> float:
        return self.file_cost / self.default_cost

    def sentence(self) -> str:
        """The figures in words: the file's, then the default's."""
        low, high = self.interval
        ours, default = statistics.fmean(self.file_kl), statistics.fmean(self.default_kl)
        return (
            f"On {len(self.file_kl)} other prompts KL to dense attention is {ours:.5f} with the file and {default:.5f} "
            f"with the default, {low:.2f} to {high:.2f} times on a prompt; attention costs {self.file_cost:.4g} and "
            f"{self.default_cost:.4g} {self.unit}, {self.cost_ratio:.3f} times."
        )
