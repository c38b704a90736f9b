# SPDX-License-Identifier: Apache-2.0
"""Times dense and sparse attention of one layer, as a server would run them: over pages, chunk by chunk."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from minference_vllm import compat
from minference_vllm.attention import Guard, LayerState
from minference_vllm.chunk import FP8, Chunk, PagedKV
from minference_vllm.config import MInferenceConfig
from minference_vllm.methods import Method, make_method
from minference_vllm.ops import choose_kernel
from minference_vllm.patterns import resolve
from minference_vllm.recall import Floors
from minference_vllm.repeats import Repeats
from minference_vllm.scratch import AttendBuffers, RecallBuffers, RecallTotals, ScratchShape
from minference_vllm.tuning.drawn import drawn_choice
from minference_vllm.tuning.gate import Timing
from minference_vllm.tuning.heads import Heads

PAGE_SIZE = 16  # vLLM's default
WARM_UPS = 3
SEED = 0

LOWEST_FLOORS = Floors(torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).tiny)
"""Under these floors the guard looks for heads to attend again, as in service, but finds none. On random keys no choice
keeps much attention, so under the floors of service all heads would be attended again."""

Run = Callable[[], torch.Tensor]


def make_state(method: Method, shape: ScratchShape, device: torch.device, measures: bool = True) -> LayerState:
    """A layer's budgets and scratch, outside a server.

    If recall is measured, measuring and the guard take their usual time, but no head is attended again (LOWEST_FLOORS).
    """
    heads = shape.num_qo_heads
    attend = AttendBuffers.allocate(heads, shape.max_chunk, device)
    guard = Guard(LOWEST_FLOORS, RecallBuffers.allocate(heads, device), RecallTotals.allocate(1, heads, device))
    budgets, buffers = method.budgets(heads, device), method.scratch(shape, device)
    return LayerState(0, budgets, buffers, attend, guard if measures else None)


class Layer:
    """One layer's cache, filled with random keys and values, and what attends to it.

    Args:
        heads: of one GPU.
        config: method and kernel.
        device: where to measure.
        max_len: the longest context.
        chunk: query rows at the end of each context.
        has_fp8_kv: whether the cache is in FP8, and the queries too, as vLLM then hands them over.
    """

    def __init__(
        self,
        heads: Heads,
        config: MInferenceConfig,
        device: torch.device,
        max_len: int,
        chunk: int,
        has_fp8_kv: bool = False,
    ) -> None:
        self.heads, self.chunk = heads, chunk
        # The random numbers are of a size that FP8 holds without scaling.
        self.dtype = FP8 if has_fp8_kv else torch.bfloat16
        self.fp8_scale = torch.ones(heads.num_kv_heads, dtype=torch.float32, device=device) if has_fp8_kv else None
        self.scale = heads.head_dim**-0.5
        self.generator = torch.Generator(device).manual_seed(SEED)
        pages = -(-max_len // PAGE_SIZE)
        cache = self._random(pages, PAGE_SIZE, heads.num_kv_heads, 2 * heads.head_dim).to(self.dtype)
        k, v = cache.transpose(1, 2).split(heads.head_dim, dim=-1)
        # On a busy server, a request's pages lie in random order.
        table = torch.randperm(pages, device=device, generator=self.generator).to(torch.int32)[None]
        self.kv = PagedKV(k, v, table, 0, self.fp8_scale, self.fp8_scale)
        self.flash_attention = compat.flash_attention(heads.head_dim)
        self.method = make_method(resolve(config.method, None).settings, choose_kernel(config.kernel, device))
        shape = ScratchShape(*heads, torch.bfloat16, max_len, min(chunk, max_len), has_fp8_kv, has_fp8_kv)
        self.state = make_state(self.method, shape, device, config.measure_recall)

    def attentions(self, tokens: int) -> tuple[Run, Run]:
        """Dense and sparse attention of the last chunk of a prompt of so many tokens, into the same output."""
        rows = min(self.chunk, tokens)
        random = self._random(rows, self.heads.num_qo_heads, self.heads.head_dim)
        q, out = random.to(self.dtype), torch.empty_like(random)
        chunk = Chunk(q, out, self.kv, tokens - rows, self.scale, self.fp8_scale)
        chooser, repeats = drawn_choice(self.method, chunk, self.state, SEED), Repeats()

        def sparse() -> torch.Tensor:
            # As in all layers of a step but the first.
            repeats.prefill(chunk, self.method, self.state, chooser)
            return out

        return dense_attention(chunk, self.flash_attention), sparse

    def _random(self, *shape: int) -> torch.Tensor:
        device = self.generator.device
        return torch.randn(shape, dtype=torch.bfloat16, device=device, generator=self.generator)


def dense_attention(chunk: Chunk, flash_attention: Callable[..., Any]) -> Run:
    """FlashAttention of a chunk to all keys, as vLLM calls it."""
    k, v, table = chunk.kv.k.transpose(1, 2), chunk.kv.v.transpose(1, 2), chunk.kv.block_table
    row, device = chunk.kv.row, chunk.q.device
    starts = torch.tensor([0, chunk.num_rows], dtype=torch.int32, device=device)
    seq_lens = torch.tensor([chunk.seq_len], dtype=torch.int32, device=device)
    scales = {"q_descale": chunk.q_scale, "k_descale": chunk.kv.k_scale, "v_descale": chunk.kv.v_scale}
    descales = {name: scale[None] for name, scale in scales.items() if scale is not None}

    def dense() -> torch.Tensor:
        flash_attention(
            q=chunk.q, k=k, v=v, out=chunk.out, cu_seqlens_q=starts, max_seqlen_q=chunk.num_rows, seqused_k=seq_lens,
            max_seqlen_k=chunk.seq_len, softmax_scale=chunk.scale, causal=True, block_table=table[row : row + 1],
            **descales,
        )  # fmt: skip
        return chunk.out

    return dense


def measure(
    heads: Heads,
    config: MInferenceConfig,
    device: torch.device,
    lengths: Sequence[int],
    chunk: int,
    repeats: int,
    has_fp8_kv: bool = False,
) -> Iterator[Timing]:
    """Dense and sparse times of each length, given as soon as they are measured."""
    layer = Layer(heads, config, device, max(lengths), chunk, has_fp8_kv)
    for tokens in lengths:
        yield Timing(tokens, *median_ms(layer.attentions(tokens), repeats))


def median_ms(runs: Sequence[Run], repeats: int) -> list[float]:
    """Median GPU time of each run. Runs take turns, so that a change of the clock affects all of them."""
    for run in [*runs] * WARM_UPS:
        run()
    spans = [[_timed(run) for run in runs] for _ in range(repeats)]
    torch.cuda.synchronize()
    return [statistics.median(start.elapsed_time(end) for start, end in of_run) for of_run in zip(*spans, strict=True)]


def _timed(run: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return start, end
