# SPDX-License-Identifier: Apache-2.0
"""A model of two sparse layers and a dense one between them, whose next tokens depend on its attention alone."""

import torch

from minference_vllm.attention import Chooser, LayerState, prefill
from minference_vllm.chunk import Chunk
from minference_vllm.methods import Block
from minference_vllm.methods.block import BlockSettings
from minference_vllm.ops import Kernel
from minference_vllm.patterns import Geometry
from minference_vllm.recall import Floors
from minference_vllm.scratch import AttendBuffers
from minference_vllm.search.contender import Ground
from minference_vllm.search.prompts import Prompt
from tests.kernels.cases import Case, make_cache

CPU = torch.device("cpu")
CASE = Case("searched", num_rows=900, context_len=0, num_qo_heads=2, num_kv_heads=1, dtype=torch.float32)
CHUNK = 512
INDICES = {0: 0, 2: 2}
MATTERS = {0: 1.0, 2: 3.0}
"""How much an output of a layer changes what comes next, by the layer's position."""

SHARP = torch.tensor([2.0, 4.0])
"""Sizes of the heads' queries, which all look one way: the larger, the fewer keys hold most of the attention."""


NO_FLOORS = Floors(0.0, 0.0)


def ground(floors: Floors = NO_FLOORS) -> Ground:
    return Ground(INDICES, CASE.shape, CPU, Kernel.REFERENCE, floors)


def chunks(prompt: Prompt, position: int) -> list[Chunk]:
    """A layer's chunks of a prompt; what the tokens are only seeds what is drawn."""
    seed = 10 * prompt[0] + position
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(CASE.num_rows, CASE.num_qo_heads, CASE.head_dim, generator=generator) / 4
    q = SHARP[:, None] * (q + torch.randn(CASE.num_qo_heads, CASE.head_dim, generator=generator))
    out, kv = torch.empty_like(q), make_cache(CASE, CPU, seed)
    return [
        Chunk(q[start : start + CHUNK], out[start : start + CHUNK], kv, start, CASE.scale, may_end_prompt=False)
        for start in range(0, CASE.num_rows, CHUNK)
    ]


class FakeReader:
    """See search.reader.Reader.

    Attributes:
        readings: prompts read so far.
        fails_after: readings until it is interrupted.
    """

    geometry = Geometry(num_layers=3, num_qo_heads=2, num_kv_heads=1, head_dim=64)

    def __init__(self, fails_after: int = 10**6) -> None:
        self.ground = ground()
        self.readings = 0
        self.fails_after = fails_after
        self._method = Block(BlockSettings(), Kernel.REFERENCE)

    def read(self, prompt: Prompt, chooser: Chooser) -> torch.Tensor:
        if self.readings == self.fails_after:
            raise KeyboardInterrupt
        self.readings += 1
        attend = AttendBuffers.allocate(CASE.num_qo_heads, CASE.shape.max_chunk, CPU)
        states = []
        for position, weight in MATTERS.items():
            layer = LayerState(position, torch.empty(0), None, attend)
            outputs = chunks(prompt, position)
            for chunk in outputs:
                prefill(chunk, self._method, layer, chooser)
            states.append(weight * torch.cat([chunk.out for chunk in outputs]))
        return torch.stack(states)

    def divergence(self, exact: torch.Tensor, other: torch.Tensor) -> float:
        return float((exact - other).square().mean())
