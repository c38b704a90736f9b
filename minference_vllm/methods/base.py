# SPDX-License-Identifier: Apache-2.0
"""What a way of choosing keys must offer. One file a method; whoever adds one adds a line to methods/__init__.py."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from minference_vllm.chunk import Chunk
from minference_vllm.index import TILE, SparseIndex
from minference_vllm.ops import Kernel
from minference_vllm.scratch import ScratchShape

MAX_TOKENS = 2**24
"""More than any model reads: the bound of settings in tokens, so that nothing derived from them overflows."""


class MethodSettings(BaseModel):
    """Settings of one method, validated and frozen. Units are tokens unless a field says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    name: str
    """Which method these are the settings of."""


class Method(ABC):
    """A way of choosing keys, with its settings and the kernels that it runs on.

    Budgets are a device tensor per layer, [num_qo_heads, ...]: how much each head keeps. Whoever knows better than the
    settings (a pattern file) writes there, and nothing waits for the device.
    """

    Settings: ClassVar[type[MethodSettings]]

    def __init__(self, settings: Any, kernel: Kernel) -> None:
        self.settings = settings
        self.kernel = kernel

    @abstractmethod
    def scratch(self, shape: ScratchShape, device: torch.device) -> Any:
        """Buffers for layers of this shape: a frozen dataclass of tensors, the method's own."""

    @abstractmethod
    def budgets(self, num_qo_heads: int, device: torch.device) -> torch.Tensor:
        """What the settings let each head of a layer keep, [num_qo_heads, ...]."""

    def prompt_lengths(self, shape: ScratchShape) -> tuple[int, ...]:
        """Lengths of prompts, up to the longest, that between them run all kernels which `choose` may."""
        return (min(2 * TILE, shape.max_seq_len),)

    def choosing_rows(self, chunk: Chunk) -> int:
        """Rows of a chunk, from its first on, that attend to what is chosen for them; the rest attend to all."""
        return chunk.num_rows

    @abstractmethod
    def choose(self, chunk: Chunk, budgets: torch.Tensor, buffers: Any) -> SparseIndex:
        """Choose the keys of one chunk. Tensors of the index are the buffers': good until the next chunk."""
