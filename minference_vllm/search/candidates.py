# SPDX-License-Identifier: Apache-2.0
"""What a head may keep: the methods that a pattern file can be for, each with choices from little to much."""

from dataclasses import dataclass
from typing import Any

from minference_vllm.methods.block import BlockSettings
from minference_vllm.patterns.shared import A_SHAPE, SHARES, SIZES, PatternShares, PatternSizes

DEFAULT = BlockSettings().share
"""The share of the method that a server without a pattern file runs."""

ROUGH = 0.5
"""The share of block with which the effect of a layer's error on the next tokens is measured. It keeps so little that
the effect of a single layer shows."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The candidates of one method.

    Attributes:
        shared: the settings that all heads share.
        heads: what a head may keep, in the form of a pattern file.
    """

    shared: PatternShares | PatternSizes
    heads: tuple[Any, ...]

    @property
    def name(self) -> str:
        return self.shared.name

    @property
    def settings(self) -> Any:
        """The method's settings, with room for each candidate."""
        return self.shared.settings(self.heads)


CANDIDATES = {
    SHARES: Candidates(
        PatternShares(name="block"),
        (ROUGH, 0.65, 0.72, 0.77, DEFAULT, 0.86, 0.91, 0.95, 0.98),
    ),
    SIZES: Candidates(
        PatternSizes(),
        ((A_SHAPE, 128, 1024), (30, 800), (500, 700), (1000, 1000), (3500, 100), (1000, 4096), (1000, 6096)),
    ),
}
"""Candidates by the method's name. Most sizes are those that MInference's search tries (arXiv 2407.02490)."""
