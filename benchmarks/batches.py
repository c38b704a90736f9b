# SPDX-License-Identifier: Apache-2.0
"""What benchmarks.attention_suite runs: batches as vLLM's scheduler mixes them, over layers and caches of many shapes.

The names and sizes of most batches follow those of vLLM's own tests of its attention backends.
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import NamedTuple

import torch

KV_SCALES = {"_q_scale": 2.0**-4, "_k_scale": 2.0**-6, "_v_scale": 2.0**-5}
"""Scales of a cache in FP8, by the layer's names. All differ, so that a mix-up shows. They are powers of two, so that
vLLM's kernel and torch round to the same FP8 number, although one may divide where the other multiplies."""

ALIKE_ROWS, ALIKE_KEYS, SHARPNESS = 128, 16, 4.0
"""For prompts whose attention is concentrated: this many neighbouring queries (or keys) share a common part, and
queries are multiplied by the sharpness. On numbers without any pattern the default settings would keep every key."""


class Request(NamedTuple):
    """One request of a step: `rows` query rows after `context_len` keys, of its prompt or else of its answer."""

    rows: int
    context_len: int = 0
    is_prompt: bool = True

    @property
    def seq_len(self) -> int:
        return self.context_len + self.rows


class Batch(NamedTuple):
    """The requests of one step."""

    name: str
    requests: tuple[Request, ...]

    @property
    def starts(self) -> list[int]:
        """First query row of each request, and the number of all rows."""
        return [0, *accumulate(request.rows for request in self.requests)]

    def spans(self) -> Iterator[tuple[Request, slice]]:
        """Each request with its query rows."""
        for request, start in zip(self.requests, self.starts, strict=False):
            yield request, slice(start, start + request.rows)

    def passes(self, min_seq_len: int, min_chunk: int) -> list[bool]:
        """Which requests should run sparse with such a gate; a single row of a prompt never does."""
        return [
            request.is_prompt and request.rows >= max(min_chunk, 2) and request.seq_len >= min_seq_len
            for request in self.requests
        ]


class Shape(NamedTuple):
    """One attention layer and its cache; `layout` is the cache's memory order of tokens (N) and heads (H)."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    cache: str = "auto"
    layout: str = "NHD"
    page_size: int = 16

    @property
    def group_size(self) -> int:
        return self.num_qo_heads // self.num_kv_heads

    @property
    def is_fp8(self) -> bool:
        return self.cache != "auto"

    @property
    def row(self) -> dict[str, str | int]:
        """Fields of a result's row."""
        heads = {"heads": f"{self.num_qo_heads}/{self.num_kv_heads}"}
        return {**heads, **{name: getattr(self, name) for name in self._fields[2:]}}


def decodes(*seq_lens: int, rows: int = 1) -> tuple[Request, ...]:
    """Requests that have read their prompts. They have more than one row each if drafted tokens are verified."""
    return tuple(Request(rows, seq_len - rows, is_prompt=False) for seq_len in seq_lens)


def chunks(rows: int, *seq_lens: int) -> tuple[Request, ...]:
    """Requests that read this many rows of their prompts, and end at these lengths."""
    return tuple(Request(rows, seq_len - rows) for seq_len in seq_lens)


BATCHES = (
    Batch("single decode", decodes(1024)),
    Batch("small decode", decodes(32, 40)),
    Batch("medium decode", decodes(128, 256, 512, 1024, 128, 256, 512, 1024)),
    Batch("large decode", decodes(*[2048] * 32)),
    Batch("speculative decode", decodes(64, 300, 1024, 2048, rows=5)),
    Batch("single prefill", chunks(64, 1024)),
    Batch("small prefill", chunks(8, 32, 40)),
    Batch("medium prefill", chunks(16, 256, 512, 1024, 2048)),
    Batch("large prefill", chunks(32, *[4096] * 8)),
    Batch("whole prompts", (Request(2), Request(63), Request(128), Request(129), Request(700))),
    Batch("mixed small", (*decodes(32, 40), *chunks(5, 48, 56))),
    Batch("mixed medium", (*decodes(512, 1024, 2048), *chunks(7, 512, 1024, 2048))),
    Batch("mixed large", (*chunks(32, 1024), *decodes(1024, 2048), *chunks(33, 2048, 4096), *decodes(4096))),
    Batch("mixed speculative", (*decodes(200, 3000, rows=4), *chunks(150, 1150), *decodes(70, rows=4), Request(90))),
    Batch("long chunk", (Request(2048, 16384),)),
    Batch("long chunk among others", (*decodes(700, 18000), Request(1500, 17001), Request(40), *decodes(90, rows=3))),
    Batch("two long chunks", (Request(1000, 15500), Request(300, 900), Request(2000, 14600))),
    Batch("long prompt, short chunk", (*chunks(200, 17000), *decodes(17000))),
)
MAX_ROWS, MAX_LEN = 4096, 18560
"""Limits of the server that runs the batches (--max-num-batched-tokens, --max-model-len)."""

SHAPES = (
    # FlashAttention-3 writes bf16 only over a cache in FP8, so fp16 comes with plain caches only. Each group size,
    # head_dim, number type, layout and page size is combined with each of the others.
    Shape(32, 8, 128),
    Shape(2, 2, 64),
    Shape(4, 2, 64, layout="HND"),
    Shape(8, 1, 256, page_size=32),
    Shape(4, 4, 128, "float16", page_size=32),
    Shape(4, 2, 256, "float16"),
    Shape(8, 2, 256, "float16", layout="HND", page_size=32),
    Shape(16, 2, 64, "float16", layout="HND"),
    Shape(2, 2, 256, cache="fp8_e4m3", layout="HND"),
    Shape(8, 4, 128, cache="fp8_e4m3", page_size=32),
    Shape(16, 4, 64, cache="fp8_e4m3", layout="HND", page_size=32),
    Shape(8, 1, 128, cache="fp8_e4m3", layout="HND", page_size=32),
)

TINY_BATCHES = (
    Batch("decode", decodes(32, 40)),
    Batch("speculative decode", decodes(64, 90, rows=5)),
    Batch("mixed", (*decodes(32), *chunks(40, 150), Request(33), *decodes(60, rows=3))),
    Batch("long chunk", (Request(300, 900), *decodes(70))),
)
TINY_SHAPES = (
    Shape(4, 2, 64, "bfloat16", "auto", "NHD", 16),
    Shape(2, 2, 128, "float32", "fp8_e4m3", "HND", 32),
)


class Inputs(NamedTuple):
    """What the layer is given in one step, and what its cache holds already.

    Attributes:
        q: [num_rows, num_qo_heads, head_dim], of the step's rows.
        k, v: [seq_len, num_kv_heads, head_dim] of each request, its rows of this step last.
        block_table: [num_reqs, max_pages] int32; entries past a request's pages are page 0, which nobody has.
        num_pages: of the cache.
    """

    q: torch.Tensor
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    block_table: torch.Tensor
    num_pages: int

    def slots(self, request: int, first: int, end: int, page_size: int) -> torch.Tensor:
        """[end - first] int64: where the request's keys from `first` on lie in the cache."""
        keys = torch.arange(first, end, device=self.q.device)
        return self.block_table[request, keys // page_size].long() * page_size + keys % page_size


def make_inputs(shape: Shape, batch: Batch, device: torch.device, seed: int) -> Inputs:
    """Random queries, keys and values, and pages in random order, some of which belong to no request."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, shape.dtype)

    def normal(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, shape.head_dim, device=device, generator=generator)

    def alike(tokens: int, heads: int, neighbours: int) -> torch.Tensor:
        shared = normal(-(-tokens // neighbours), heads).repeat_interleave(neighbours, 0)[:tokens]
        return (shared + normal(tokens, heads)) / 2**0.5

    def queries(request: Request) -> torch.Tensor:
        rows, heads = request.rows, shape.num_qo_heads
        if not request.is_prompt:
            return normal(rows, heads)
        before = request.context_len % ALIKE_ROWS  # runs begin at absolute positions, as tiles do
        return SHARPNESS * alike(before + rows, heads, ALIKE_ROWS)[before:]

    pages = [-(-request.seq_len // shape.page_size) for request in batch.requests]
    num_pages = 1 + sum(pages) + len(pages)
    order = 1 + torch.randperm(num_pages - 1, device=device, generator=generator).int()
    table = torch.zeros(len(pages), max(pages), dtype=torch.int32, device=device)
    for request, (first, count) in enumerate(zip(accumulate([0, *pages]), pages, strict=False)):
        table[request, :count] = order[first : first + count]
    q = torch.cat([queries(request) for request in batch.requests])
    k = [alike(request.seq_len, shape.num_kv_heads, ALIKE_KEYS).to(dtype) for request in batch.requests]
    v = [normal(request.seq_len, shape.num_kv_heads).to(dtype) for request in batch.requests]
    return Inputs(q.to(dtype), k, v, table, num_pages)
