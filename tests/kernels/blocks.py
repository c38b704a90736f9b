# SPDX-License-Identifier: Apache-2.0
"""Chunks for the tests of `block`, and buffers for what its operations write."""

import pytest
import torch

from minference_vllm import reference
from minference_vllm.boxes import BOX_MEAN, COARSE_AT_ONCE, LISTS, Boxes
from minference_vllm.chunk import Chunk
from minference_vllm.index import EVERY_GROUP, GROUPS_PER_TILE, HALVES, TileIndex
from minference_vllm.ops import Kernel
from minference_vllm.reference.normalisers import PART
from minference_vllm.scratch import FP8, MEAN
from tests.kernels.cases import Case

SINKS, LOCAL, LONG = 2, 3, 40  # tiles with fewer than LONG groups before them drop less
BF16 = torch.bfloat16
CASES = [
    Case("chunk inside a tile", num_rows=80, context_len=340),
    Case("no context", num_rows=150, context_len=0, page_size=128, layout="HND"),
    Case("1 row", num_rows=1, context_len=400, num_kv_heads=1),
    Case("1 row, nothing before", num_rows=1, context_len=0),
    Case("second half only", num_rows=40, context_len=200, page_size=48),
    Case("no grouping", num_rows=60, context_len=230, num_qo_heads=3, num_kv_heads=3),
    Case("group of seven", num_rows=60, context_len=220, num_qo_heads=7, num_kv_heads=1),
    Case("head_dim 128", num_rows=50, context_len=256, head_dim=128, dtype=BF16),
    Case("head_dim 256", num_rows=50, context_len=200, head_dim=256, num_qo_heads=2, num_kv_heads=1, page_size=32),
    Case("float32", num_rows=70, context_len=200, dtype=torch.float32),
]
GPU_CASES = [
    Case("long", num_rows=3000, context_len=9001, head_dim=128, num_qo_heads=8, num_kv_heads=2, dtype=BF16),
    Case("64K context", num_rows=700, context_len=65_536, num_qo_heads=7, num_kv_heads=1, dtype=BF16),
]
every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name) for case in CASES]
    + [pytest.param(case, id=case.name, marks=pytest.mark.gpu) for case in GPU_CASES],
)
score_dtypes = pytest.mark.parametrize("is_fp8", [False, True], ids=["model", "fp8"])
engines = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(Kernel.REFERENCE, id="reference"),
        pytest.param(Kernel.TRITON, id="triton"),
        pytest.param(Kernel.CUDA, id="cuda", marks=[pytest.mark.gpu, pytest.mark.hopper]),
    ],
)
SPARSE = Case("", num_rows=100, context_len=306, num_qo_heads=2, num_kv_heads=1)


def make_means(chunk: Chunk, mean: int = 4, is_fp8: bool = False) -> torch.Tensor:
    """Means of the request's keys, and poison where there are none; in the model's dtype if not in FP8."""
    means = torch.full((chunk.kv.num_kv_heads, chunk.seq_len // mean + 5, chunk.head_dim), torch.nan)
    means = means.to(chunk.q.device, FP8 if is_fp8 else chunk.out.dtype)
    reference.key_means(chunk.kv, chunk.seq_len, means, mean=mean)
    return means


def make_coarse(chunk: Chunk, means: torch.Tensor) -> torch.Tensor:
    """Coarse means, and poison where there are none."""
    room = (chunk.seq_len // BOX_MEAN // COARSE_AT_ONCE + 1) * COARSE_AT_ONCE
    coarse = torch.full((len(means), room, chunk.head_dim), torch.nan)
    coarse = coarse.to(means.device, means.dtype)
    reference.coarse_means(means, chunk.seq_len, coarse, MEAN, BOX_MEAN)
    return coarse


def make_lse(chunk: Chunk, rows_per_half: int = 16) -> torch.Tensor:
    """A poisoned buffer for normalisers, of a few halves more than the chunk has."""
    shape = (chunk.num_qo_heads, chunk.num_tiles * HALVES + 3, rows_per_half)
    return torch.full(shape, torch.nan, device=chunk.q.device)


def parts_of(chunk: Chunk, rows_per_half: int) -> int:
    return chunk.num_tiles * HALVES * rows_per_half // PART


def make_boxes(chunk: Chunk, rows_per_half: int, room: int) -> Boxes:
    """Poisoned buffers for the boxes that are chosen, a little larger than needed."""
    parts = parts_of(chunk, rows_per_half)
    blocks, device = -(-parts * chunk.group_size // LISTS) + 1, chunk.q.device
    numbers = torch.full((chunk.kv.num_kv_heads + 1, blocks, room), -7, dtype=torch.int32, device=device)
    counts = torch.full(numbers.shape[:2], -7, dtype=torch.int32, device=device)
    thresholds = torch.full((chunk.num_qo_heads, parts + 2), -7, dtype=torch.int32, device=device)
    return Boxes(numbers, counts, thresholds)


def make_masses(chunk: Chunk, num_heads: int, rows_per_half: int = 16) -> torch.Tensor:
    groups = (chunk.first_tile + chunk.num_tiles) * GROUPS_PER_TILE
    shape = (num_heads, parts_of(chunk, rows_per_half) + 1, groups)
    return torch.full(shape, 99, dtype=torch.uint8, device=chunk.q.device)


def make_index(chunk: Chunk, max_kept: int) -> TileIndex:
    tiles = chunk.num_tiles + 1
    groups = torch.full((chunk.num_qo_heads, tiles, max_kept), -7, dtype=torch.int32, device=chunk.q.device)
    return TileIndex(groups, torch.full((chunk.num_qo_heads, tiles, 3), -7, dtype=torch.int32, device=groups.device))


def kept_by_half(index: TileIndex, chunk: Chunk, head: int, tile: int) -> torch.Tensor:
    """[HALVES, groups before the tile] bool. Lists that are not ascending, in bounds and disjoint fail here."""
    kept = torch.zeros(HALVES, (chunk.first_tile + tile) * GROUPS_PER_TILE, dtype=torch.bool)
    counts = index.counts[head, tile].tolist()
    if counts == [EVERY_GROUP, 0, 0]:
        return ~kept
    listed = index.groups[head, tile, : sum(counts)].cpu().long()
    assert len(listed.unique()) == len(listed) == sum(counts)
    for groups, halves in zip(listed.split(counts), ([0, 1], [0], [1]), strict=True):
        assert torch.equal(groups, groups.sort().values)
        kept[torch.tensor(halves)[:, None], groups] = True
    return kept
