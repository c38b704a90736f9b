# SPDX-License-Identifier: Apache-2.0
"""The layers of a model, and what is launched for them."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minference_vllm.attention import Guard, LayerState
from minference_vllm.chunk import Chunk
from minference_vllm.methods import Method
from minference_vllm.recall import Floors
from minference_vllm.scratch import AttendBuffers, RecallBuffers, RecallTotals
from tests.kernels.cases import Case, make_chunk

CPU = torch.device("cpu")
NUM_LAYERS = 3


@dataclass(frozen=True)
class Layers:
    """The layers of a model: each with tensors of its own, all with the same scratch."""

    chunks: list[Chunk]
    states: list[LayerState]

    @classmethod
    def of(cls, case: Case, method: Method, may_end: bool = True, device: torch.device = CPU) -> "Layers":
        heads = case.num_qo_heads
        totals = RecallTotals.allocate(NUM_LAYERS, heads, device)
        guard = Guard(Floors(0.7, 0.15), RecallBuffers.allocate(heads, device), totals)
        attend, buffers = AttendBuffers.allocate(heads, case.num_rows, device), method.scratch(case.shape, device)
        states = [
            LayerState(number, method.budgets(heads, device), buffers, attend, guard) for number in range(NUM_LAYERS)
        ]
        made = [make_chunk(case, device) for _ in range(NUM_LAYERS)]
        table = made[0].kv.block_table
        chunks = [replace(one, kv=one.kv._replace(block_table=table), may_end_prompt=may_end) for one in made]
        return cls(chunks, states)


class Launched(TorchDispatchMode):
    """What is launched, with every argument: kernels of both kinds, and what torch writes."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__.endswith("_"):
            self.all.append((str(function), *map(plain, args)))
        return function(*args, **(kwargs or {}))

    def cuda(self, function: str, arguments: ctypes.Structure, device: torch.device) -> None:
        self.all.append((function, bytes(arguments)))

    def triton(self, name: str) -> Any:
        launched = self.all

        class Stand:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                return lambda *args, **constants: launched.append((name, grid, *map(plain, args), constants))

        return Stand()

    def take(self) -> list[Any]:
        taken, self.all[:] = list(self.all), []
        return taken


def plain(value: Any) -> Any:
    """A tensor's address and dtype, which is all that a kernel gets to know of it; other values as they are."""
    return (value.data_ptr(), value.dtype) if isinstance(value, torch.Tensor) else value
