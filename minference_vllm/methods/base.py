# SPDX-License-Identifier: Apache-2.0
"""The interface of methods of choosing keys. Each method is a file, and is listed in methods/__init__.py."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict

from minference_vllm.chunk import Chunk
from minference_vllm.index import TILE, SparseIndex
from minference_vllm.ops import Kernel
from minference_vllm.scratch import ScratchShape

MAX_TOKENS = 2**24
"""Upper bound of settings in tokens: more than the context of any model, so small that nothing derived from it
overflows."""


class MethodSettings(BaseModel):
    """Settings of one method, validated and frozen. Units are tokens unless a field says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    name: str
    """Which method these are the settings of."""


class Method(ABC):
    """A way of choosing keys, with its settings and the kernels that it runs on.

    Budgets are a device tensor for each layer, [num_qo_heads, ...], that says how much each head keeps. A pattern file
    replaces the settings' values by writing there, without waiting for the device.
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
        """Lengths of prompts, at most shape.max_seq_len, which together run every kernel that `choose` may run."""
        return (min(2 * TILE, shape.max_seq_len),)

    def choosing_rows(self, chunk: Chunk) -> int:
        """How many rows of a chunk, from its first on, attend to chosen keys only; later rows attend to all keys."""
        return chunk.num_rows

    @abstractmethod
    def choose(self, chunk: Chunk, budgets: torch.Tensor, buffers: Any) -> SparseIndex:
        """Choose the keys of one chunk. The index's tensors are part of the buffers, valid until the next chunk."""
