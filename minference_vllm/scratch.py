# SPDX-License-Identifier: Apache-2.0
"""Scratch memory of the sparse path, typed by the operation that uses it.

Claimed once, in vLLM's profiling run, and shared by all layers of a worker that have the same shape: one chunk of one
layer uses it and the next overwrites it. A step allocates nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch

from minference_vllm.chunk import FP8
from minference_vllm.recall import NUM_BUCKETS

MASS_UNIT = 2.0**-23
"""Attention mass is counted in multiples of this: 128 probe rows of mass 1 still fit an int32."""

PROBE_SPLITS = 32
"""Key ranges that the probe's passes work on side by side."""

PROBE_PARTIALS = 128
"""Key ranges for which the partial softmax has room: the CUDA probe takes as many as fill the GPU."""

SELECT_BINS = 2048
"""Weights that the selection tells apart."""

SELECT_SPLITS = 16
"""Ranges of a row that the selection works on side by side."""

MEAN = 4
"""Consecutive keys, from a multiple of MEAN on, whose mean stands for them when groups are chosen."""

FP8_UNIT = 4.0
"""Means in FP8, and query rows rounded to it, are multiples of this, a power of two: keys and queries up to 1792 do not
saturate, and their common sizes lie where FP8 is relatively most exact."""

FP8_MAX = 448.0
"""The largest number of FP8."""

MASS_CODES = 256
"""Values of a group's mass code, 0 being nothing: see minference_vllm.reference.codes."""

CODES_PER_OCTAVE = 8
"""Mass codes for each factor of two: neighbours differ by 7 to 12%, less than the estimate is wrong by."""

OCTAVES_BELOW_ONE = 26
"""Masses under 2^-26 count as nothing. The largest code stands for 58 and more: 16 rows give a group 64 at most."""

HELD_OUT_ROWS = 64
"""Query rows of a part of a chunk whose recall is measured; see recall.parts_of."""

LIST_BYTES = 256 * 2**20
"""Lists of groups take no more than this. So in the longest prompts a tile may list less of them than it else might."""

MASS_BYTES = 136 * 2**20
"""Mass codes take no more than this: heads choose in turns where those of all do not fit. With chunks of 16,384 rows
and 32 heads they do up to 131,072 tokens."""


@dataclass(frozen=True, slots=True)
class ScratchShape:
    """What sizes scratch: a layer's heads on this tensor-parallel rank, the longest request and chunk in tokens.

    `dtype` is the model's; the cache, and the queries with it, may be in FP8. `sinks_dtype` is that of Chunk.sinks: it
    sizes nothing, but kernels are compiled for it.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    max_seq_len: int
    max_chunk: int
    has_fp8_kv: bool = False
    has_fp8_q: bool = False
    sinks_dtype: torch.dtype | None = None

    @property
    def kv_dtype(self) -> torch.dtype:
        return FP8 if self.has_fp8_kv else self.dtype

    @property
    def q_dtype(self) -> torch.dtype:
        return FP8 if self.has_fp8_q else self.dtype


@dataclass(frozen=True, slots=True)
class ProbeBuffers:
    """What the probe writes.

    Attributes:
        partial_max, partial_sum: [num_qo_heads, PROBE_PARTIALS, num_probes] float32, partial softmax of the probe rows.
        lse: [num_qo_heads, num_probes] float32, natural log-sum-exp of the probe rows over all their keys.
        vertical, slash: [num_qo_heads, max_len] int32, attention mass of columns and diagonals (unit: MASS_UNIT).
    """

    partial_max: torch.Tensor
    partial_sum: torch.Tensor
    lse: torch.Tensor
    vertical: torch.Tensor
    slash: torch.Tensor

    @classmethod
    def allocate(cls, num_heads: int, num_probes: int, max_len: int, device: torch.device) -> "ProbeBuffers":
        partial = (num_heads, PROBE_PARTIALS, num_probes)
        return cls(
            partial_max=torch.zeros(partial, dtype=torch.float32, device=device),
            partial_sum=torch.zeros(partial, dtype=torch.float32, device=device),
            lse=torch.zeros(num_heads, num_probes, dtype=torch.float32, device=device),
            vertical=torch.zeros(num_heads, max_len, dtype=torch.int32, device=device),
            slash=torch.zeros(num_heads, max_len, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class SelectBuffers:
    """What the selection counts in.

    Attributes:
        histogram: [num_heads, SELECT_BINS] int32, entries of a row by weight.
        counts: [num_heads, SELECT_SPLITS, 2] int32, entries of a range above and at the threshold.
        totals: [num_heads, SELECT_SPLITS] int64, mass of a range (unit: MASS_UNIT); for a share of it only.
    """

    histogram: torch.Tensor
    counts: torch.Tensor
    totals: torch.Tensor

    @classmethod
    def allocate(cls, num_heads: int, device: torch.device) -> "SelectBuffers":
        return cls(
            histogram=torch.zeros(num_heads, SELECT_BINS, dtype=torch.int32, device=device),
            counts=torch.zeros(num_heads, SELECT_SPLITS, 2, dtype=torch.int32, device=device),
            totals=torch.zeros(num_heads, SELECT_SPLITS, dtype=torch.int64, device=device),
        )


@dataclass(frozen=True, slots=True)
class AttendBuffers:
    """What attending writes beside the output.

    Attributes:
        lse: [num_qo_heads, max_chunk] float32, natural log-sum-exp of every row over its kept keys, no sink among them.
        kept_pairs: [1] int64, row-key pairs attended to since the start; only ever added to.
        tile_counter: [1] int32, zero between launches: the CUDA kernel's programs draw their tiles from it.
    """

    lse: torch.Tensor
    kept_pairs: torch.Tensor
    tile_counter: torch.Tensor

    @classmethod
    def allocate(cls, num_heads: int, max_chunk: int, device: torch.device) -> "AttendBuffers":
        return cls(
            lse=torch.zeros(num_heads, max_chunk, dtype=torch.float32, device=device),
            kept_pairs=torch.zeros(1, dtype=torch.int64, device=device),
            tile_counter=torch.zeros(1, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True, slots=True)
class RecallTotals:
    """What was measured of all layers since the start, in one tensor, so that it comes to the host in one copy.

    Attributes:
        flat: [num_buckets + num_layers * (2 + 2 * num_qo_heads)] float64; the rest are views of it.
        histogram: [num_buckets] recalls of a head in a chunk, by recall.RECALL_EDGES.
        chunks: [num_layers] chunks measured.
        redone: [num_layers] heads of chunks that were attended to again.
        sums: [num_layers, num_qo_heads] of the recalls.
        worst: [num_layers, num_qo_heads] smallest recall, 1 before the first.
    """

    flat: torch.Tensor
    histogram: torch.Tensor
    chunks: torch.Tensor
    redone: torch.Tensor
    sums: torch.Tensor
    worst: torch.Tensor

    @classmethod
    def of(cls, flat: torch.Tensor, num_layers: int, num_heads: int) -> "RecallTotals":
        """The views of `flat`."""
        each = num_layers * num_heads
        sizes = [NUM_BUCKETS, num_layers, num_layers, each, each]
        histogram, chunks, redone, sums, worst = flat.split(sizes)
        return cls(flat, histogram, chunks, redone, sums.view(num_layers, -1), worst.view(num_layers, -1))

    @classmethod
    def allocate(cls, num_layers: int, num_heads: int, device: torch.device) -> "RecallTotals":
        size = NUM_BUCKETS + num_layers * (2 + 2 * num_heads)
        totals = cls.of(torch.zeros(size, dtype=torch.float64, device=device), num_layers, num_heads)
        totals.worst.fill_(1.0)
        return totals


@dataclass(frozen=True, slots=True)
class RecallBuffers:
    """What measuring recall writes.

    Attributes:
        partial_max, partial_sum: [num_qo_heads, PROBE_PARTIALS, HELD_OUT_ROWS] float32, partial softmax of the rows.
        recall: [num_qo_heads] float32, of each head in the chunk measured last; before its last part is, sums.
        lost: [num_qo_heads] int32, held-out rows of the parts measured so far that are below the floor for rows.
        heads: [num_qo_heads] int32, those of them that are below the floor, in any order; valid up to num_heads.
        num_heads: [1] int32.
    """

    partial_max: torch.Tensor
    partial_sum: torch.Tensor
    recall: torch.Tensor
    lost: torch.Tensor
    heads: torch.Tensor
    num_heads: torch.Tensor

    @classmethod
    def allocate(cls, num_heads: int, device: torch.device) -> "RecallBuffers":
        partial = (num_heads, PROBE_PARTIALS, HELD_OUT_ROWS)
        return cls(
            partial_max=torch.zeros(partial, dtype=torch.float32, device=device),
            partial_sum=torch.zeros(partial, dtype=torch.float32, device=device),
            recall=torch.zeros(num_heads, dtype=torch.float32, device=device),
            lost=torch.zeros(num_heads, dtype=torch.int32, device=device),
            heads=torch.zeros(num_heads, dtype=torch.int32, device=device),
            num_heads=torch.zeros(1, dtype=torch.int32, device=device),
        )


def num_bytes(buffers: Any) -> int:
    """Bytes of all tensors in a dataclass of tensors and of such dataclasses."""
    return sum(tensor.nbytes for tensor in _tensors(buffers))


def _tensors(buffers: Any) -> Iterator[torch.Tensor]:
    for field in fields(buffers):
        value = getattr(buffers, field.name)
        if isinstance(value, torch.Tensor):
            yield value
        elif is_dataclass(value):
            yield from _tensors(value)
