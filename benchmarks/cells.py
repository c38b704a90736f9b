# SPDX-License-Identifier: Apache-2.0
"""What benchmarks.never_slower measures: cells of a prompt length, a number of prompts at once, and a chunk size."""

from collections.abc import Sequence
from fnmatch import fnmatch
from typing import NamedTuple

from minference_vllm.config import MInferenceConfig

CHUNKS = (1024, 2048, 8192, 16384)
PROMPTS = {1: (2048, 8192, 16384, 32768, 65536), 8: (2048, 16384), 32: (2048, 16384)}
"""Prompt lengths by the number of prompts at once. 32 longer prompts would fill the cache and take minutes."""
TINY_CHUNKS, TINY_PROMPTS = (128,), {1: (100, 300), 3: (260,)}


class Cell(NamedTuple):
    """Some prompts at once, of the same length, read in chunks of one size (--max-num-batched-tokens).

    Attributes:
        tokens: of each prompt, in round numbers; see `length`.
    """

    chunk: int
    tokens: int
    prompts: int

    @property
    def length(self) -> int:
        """Tokens that each prompt has.

        The plugin cannot see that a prompt ends if it fills its last chunk, so its last rows choose keys like all
        others. Few real prompts do so; a single prompt is therefore made an eighth of a chunk longer. Several at once
        are not: the next one would begin in the step in which another ends, with fewer rows than `min_chunk`.
        """
        is_cut_evenly = self.prompts == 1 and self.tokens % self.chunk == 0
        return self.tokens + (self.chunk // 8 if is_cut_evenly else 0)

    def __str__(self) -> str:
        return f"{self.chunk}/{self.tokens}/{self.prompts}"

    def goes_sparse(self, config: MInferenceConfig) -> bool:
        """Whether the gate lets any chunk through."""
        return self.tokens >= config.min_seq_len and min(self.chunk, self.tokens) >= config.min_chunk


def make_cells(tiny: bool, patterns: Sequence[str]) -> list[Cell]:
    """The cells that match one of the patterns, ordered by chunk size."""
    chunks, prompts = (TINY_CHUNKS, TINY_PROMPTS) if tiny else (CHUNKS, PROMPTS)
    cells = [Cell(chunk, tokens, count) for chunk in chunks for count, lengths in prompts.items() for tokens in lengths]
    return [cell for cell in cells if any(fnmatch(str(cell), pattern) for pattern in patterns)]
