# SPDX-License-Identifier: Apache-2.0
"""Each operation on a small prompt of odd lengths, so that a kernel can be compared with its twin in plain torch.

The inputs of every operation come from the reference, so that one wrong operation does not spoil those after it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Final, NamedTuple

import torch

from minference_vllm import ops
from minference_vllm.boxes import Boxes
from minference_vllm.chunk import FP8, Chunk, PagedKV
from minference_vllm.index import BANDS_PER_TILE, GROUPS_PER_TILE, HALVES, TILE, AnyIndex, HeadIndex
from minference_vllm.kernels import cuda
from minference_vllm.methods.block import Block, BlockSettings
from minference_vllm.methods.block_scratch import BlockBuffers
from minference_vllm.methods.vertical_slash import VerticalSlash, VerticalSlashBuffers, VerticalSlashSettings
from minference_vllm.ops import Kernel
from minference_vllm.recall import Floors
from minference_vllm.reference.normalisers import PART
from minference_vllm.scratch import AttendBuffers, RecallBuffers, RecallTotals, ScratchShape

CONTEXT, ROWS, PAGE_SIZE = 333, 211, 16
SEQ_LEN = CONTEXT + ROWS
ROWS_PER_HALF: Final = 32
# Allowed relative errors. bf16 keeps eight bits of outputs and probabilities; float32 sums depend on their order.
ROUNDED, SUMMED, COUNTED, EXACT = 3.2e-2, 2e-3, 1e-2, 0.0


class Shape(NamedTuple):
    """Heads of the prompt."""

    num_qo_heads: int = 6
    num_kv_heads: int = 2
    head_dim: int = 128


Results = list[tuple[torch.Tensor, float]]
"""The tensors that an operation wrote, each with the relative error that a row of it may have."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One operation.

    Attributes:
        name: of the operation.
        has_cuda: whether the CUDA library has code for it, for these heads and this cache.
        run: runs the operation with a kernel, into buffers of its own.
        reads_cache: whether it reads queries, keys or values, so that their type matters.
    """

    name: str
    has_cuda: bool
    run: Callable[[Kernel], Results]
    reads_cache: bool = True


def make_chunk(shape: Shape, device: torch.device) -> Chunk:
    """The prompt's last rows, over pages in random order; cache slots past the prompt's last key hold NaN."""
    generator = torch.Generator().manual_seed(0)
    pages = -(-SEQ_LEN // PAGE_SIZE)
    cache = torch.randn(pages * PAGE_SIZE, shape.num_kv_heads, 2 * shape.head_dim, generator=generator)
    cache[SEQ_LEN:] = torch.nan
    order = torch.randperm(pages, generator=generator)
    paged = torch.empty_like(cache).view(pages, PAGE_SIZE, shape.num_kv_heads, -1)
    paged[order] = cache.view_as(paged)
    k, v = paged.to(device, torch.bfloat16).transpose(1, 2).split(shape.head_dim, dim=-1)
    table = order.to(device, torch.int32)[None]
    # A view of the fused projection, as vLLM passes it.
    width = shape.num_qo_heads + 2 * shape.num_kv_heads
    qkv = torch.randn(ROWS, width, shape.head_dim, generator=generator).to(device, torch.bfloat16)
    q = qkv[:, : shape.num_qo_heads]
    scale = shape.head_dim**-0.5
    return Chunk(q, torch.zeros_like(q), PagedKV(k, v, table, 0), CONTEXT, scale, may_end_prompt=False)


def in_fp8(chunk: Chunk) -> Chunk:
    """The same rows and keys in FP8; each KV head has scales of its own."""
    heads = torch.arange(chunk.kv.num_kv_heads, device=chunk.q.device)
    # Powers of two, so that only the rounding to FP8 is lost. Neighbouring heads have different scales.
    q_scale, k_scale, v_scale = (2.0 ** -(bits + heads % 2).float() for bits in (4, 5, 3))

    def divided(tensor: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return (tensor.float() / by[:, None, None]).to(FP8)

    of_rows = q_scale.repeat_interleave(chunk.group_size)
    q = (chunk.q.float() / of_rows[:, None]).to(FP8)
    kv = chunk.kv._replace(
        k=divided(chunk.kv.k, k_scale), v=divided(chunk.kv.v, v_scale), k_scale=k_scale, v_scale=v_scale
    )
    return replace(chunk, q=q, kv=kv, q_scale=q_scale)


def scratch_shape(chunk: Chunk) -> ScratchShape:
    heads = chunk.num_qo_heads, chunk.kv.num_kv_heads, chunk.head_dim
    fp8 = chunk.is_quantized, chunk.q.dtype == FP8
    return ScratchShape(*heads, chunk.out.dtype, SEQ_LEN, ROWS, *fp8)


def make_trials(chunk: Chunk, kernel: Kernel) -> Iterator[Trial]:
    """All operations, with the arguments that this kernel would get."""
    yield from _trials_of_bands(chunk)
    yield from _trials_of_groups(chunk, kernel)
    yield from _trials_of_recall(chunk)


def _trials_of_bands(chunk: Chunk) -> Iterator[Trial]:
    """The operations that `vertical_slash` consists of."""
    settings = VerticalSlashSettings(vertical_size=40, slash_size=120, probe_rows="both")
    method, device = VerticalSlash(settings, Kernel.REFERENCE), chunk.q.device
    made: VerticalSlashBuffers = method.scratch(scratch_shape(chunk), device)
    index = method.choose(chunk, method.budgets(chunk.num_qo_heads, device), made)
    num_bands = (SEQ_LEN - 1) // TILE * BANDS_PER_TILE
    slash_indptr = made.slash_indptr[:, : num_bands + BANDS_PER_TILE + 1]
    heads = chunk.num_qo_heads

    def probe(kernel: Kernel) -> Results:
        buffers = method.scratch(scratch_shape(chunk), device).probe
        ops.probe(chunk, *settings.probe_counts, buffers, kernel)
        return [(buffers.lse, SUMMED), (buffers.vertical, COUNTED), (buffers.slash, COUNTED)]

    def select(kernel: Kernel) -> Results:
        buffers = method.scratch(scratch_shape(chunk), device)
        indptr, kept, keep = buffers.index.columns_indptr, buffers.index.columns, torch.full_like(made.sizes[:, 0], 33)
        forced = torch.full_like(keep, 4)
        ops.select(made.probe.vertical, SEQ_LEN, keep, forced, indptr, TILE, kept, buffers.select, kernel)
        return [(indptr, EXACT), (kept, EXACT)]

    def share_sizes(kernel: Kernel) -> Results:
        buffers, share = method.scratch(scratch_shape(chunk), device), torch.full((heads,), 0.9, device=device)
        keep = buffers.sizes[:, 0]
        forced = torch.full_like(keep, 16)
        ops.share_sizes(made.probe.slash, SEQ_LEN, share, forced, SEQ_LEN, keep, buffers.select, kernel)
        return [(keep, EXACT)]

    def band_lists(kernel: Kernel) -> Results:
        lists = method.scratch(scratch_shape(chunk), device).index
        indptr = lists.bands_indptr[:, :, : num_bands // BANDS_PER_TILE + 1]
        ops.band_lists(slash_indptr, num_bands, lists.bands, indptr, lists.band_halves, kernel)
        return [(lists.bands, EXACT), (indptr, EXACT), (lists.band_halves, EXACT)]

    yield Trial("probe", cuda.probe.supports(chunk, *settings.probe_counts), probe)
    yield Trial("select", False, select, reads_cache=False)
    yield Trial("share", False, share_sizes, reads_cache=False)
    yield Trial("band lists", False, band_lists, reads_cache=False)
    yield Trial("attend to bands", True, _attending(chunk, index))


def _trials_of_groups(chunk: Chunk, kernel: Kernel) -> Iterator[Trial]:
    """The operations that `block` consists of."""
    settings = BlockSettings(
        rows_per_half=ROWS_PER_HALF, rows_per_list=64, sink_tokens=16, local_tokens=16, coarse_from=0
    )
    method, device = Block(settings, Kernel.REFERENCE), chunk.q.device
    shape = scratch_shape(chunk)
    dtype = ops.means_dtype("auto", shape, kernel, device)
    empty = method.scratch(shape, device)
    scratch = replace(empty, means=empty.means.to(dtype), coarse_means=empty.coarse_means.to(dtype))
    budgets = method.budgets(chunk.num_qo_heads, device)
    index = method.choose(chunk, budgets, scratch)
    made = method.buffers(chunk, scratch)
    # From a part's own tile on, its masses are unspecified and not compared.
    is_before = torch.arange(made.masses.shape[2], device=device) < _tiles_before(chunk) * GROUPS_PER_TILE

    def key_means(kernel: Kernel) -> Results:
        means = torch.zeros_like(made.means)
        ops.key_means(chunk.kv, SEQ_LEN, means, kernel)
        return [(means.float(), ROUNDED)]

    def row_normalisers(kernel: Kernel) -> Results:
        row_lse = torch.zeros_like(made.row_lse)
        ops.row_normalisers(chunk, made.means, row_lse, kernel)
        return [(row_lse, SUMMED)]

    def group_masses(kernel: Kernel) -> Results:
        masses = torch.zeros_like(made.masses)
        ops.group_masses(chunk, made.means, made.row_lse, masses, kernel)
        return [(masses[:, : len(is_before)] * is_before, COUNTED)]

    def select_groups(kernel: Kernel, by_tile: bool = False) -> Results:
        lists = method.scratch(shape, device).index
        ops.select_groups(made.masses.clone(), chunk, budgets, ROWS_PER_HALF, 1, 1, 40, by_tile, lists, kernel)
        return [(lists.counts, EXACT), (lists.groups, EXACT)]

    yield Trial("means of keys", False, key_means)
    yield Trial("normalisers", False, row_normalisers)
    yield from _trials_of_boxes(chunk, budgets, made)
    yield Trial("masses of groups", True, group_masses)
    yield Trial("select groups", False, select_groups, reads_cache=False)
    yield Trial("select groups by tile", True, partial(select_groups, by_tile=True), reads_cache=False)
    yield Trial("attend to groups", True, _attending(chunk, index))


def _trials_of_boxes(chunk: Chunk, budgets: torch.Tensor, made: BlockBuffers) -> Iterator[Trial]:
    """The further operations of `block` in long prompts."""
    coarse = made.coarse
    assert coarse is not None
    is_before = torch.arange(coarse.masses.shape[2], device=chunk.q.device) < _tiles_before(chunk)

    def coarse_means(kernel: Kernel) -> Results:
        means = torch.zeros_like(coarse.means)
        ops.coarse_means(made.means, SEQ_LEN, means, kernel)
        return [(means.float(), ROUNDED)]

    def box_masses(kernel: Kernel) -> Results:
        masses = torch.zeros_like(coarse.masses)
        ops.box_masses(chunk, coarse.means, made.row_lse, masses, kernel)
        return [(masses[:, : len(is_before)] * is_before, COUNTED)]

    def select_boxes(kernel: Kernel) -> Results:
        boxes = Boxes(*(torch.zeros_like(getattr(coarse.boxes, field.name)) for field in fields(Boxes)))
        masses = torch.ones_like(made.masses)
        ops.select_boxes(coarse.masses, chunk, budgets, ROWS_PER_HALF, 1, 1, boxes, masses, kernel)
        return [(of, EXACT) for of in (boxes.numbers, boxes.counts, masses)]

    yield Trial("coarse means", False, coarse_means, reads_cache=False)
    yield Trial("masses of boxes", True, box_masses)
    yield Trial("select boxes", True, select_boxes, reads_cache=False)


def _tiles_before(chunk: Chunk) -> torch.Tensor:
    """[parts, 1] int64: how many tiles lie before the tile that a part of the choosing rows belongs to."""
    parts_per_tile = HALVES * ROWS_PER_HALF // PART
    part = torch.arange(chunk.num_tiles * parts_per_tile, device=chunk.q.device)
    return chunk.first_tile + part[:, None] // parts_per_tile


def _trials_of_recall(chunk: Chunk) -> Iterator[Trial]:
    """The operations that the guard consists of."""
    heads, device = chunk.num_qo_heads, chunk.q.device
    # In every other head, these rows have kept less than half of their attention.
    whole = AttendBuffers.allocate(heads, ROWS, device)
    everyone = torch.arange(heads, dtype=torch.int32, device=device)
    ops.attend(chunk, HeadIndex(everyone, torch.tensor([heads], device=device)), whole, Kernel.REFERENCE)
    whole.lse[::2] -= 0.9

    def measure_recall(kernel: Kernel) -> Results:
        buffers, totals = RecallBuffers.allocate(heads, device), RecallTotals.allocate(1, heads, device)
        ops.measure_recall(chunk, whole.lse, Floors(0.7, 0.0), 0, buffers, totals, kernel)
        listed = buffers.heads[: int(buffers.num_heads)].sort().values
        return [(buffers.recall, SUMMED), (listed, EXACT), (totals.flat, SUMMED)]

    some = HeadIndex(everyone.flip(0), torch.tensor([heads // 2], dtype=torch.int32, device=device))
    yield Trial("recall", cuda.probe.supports_held_out(chunk), measure_recall)
    yield Trial("attend to all keys", True, _attending(chunk, some))


def _attending(chunk: Chunk, index: AnyIndex) -> Callable[[Kernel], Results]:
    def attend(kernel: Kernel) -> Results:
        buffers = AttendBuffers.allocate(chunk.num_qo_heads, ROWS, chunk.q.device)
        own = replace(chunk, out=torch.zeros_like(chunk.out))
        ops.attend(own, index, buffers, kernel)
        return [(own.out, ROUNDED), (buffers.lse, SUMMED), (buffers.kept_pairs, EXACT)]

    return attend
