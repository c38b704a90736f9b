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
"""Key ranges that the Triton probe's passes process in parallel."""

PROBE_PARTIALS = 128
"""Key ranges for which the buffers of partial softmaxes have room: the CUDA probe uses as many as fill the GPU."""

SELECT_BINS = 2048
"""Number of different weights in the selection, see reference.select.weights."""

SELECT_SPLITS = 16
"""Ranges of a row that the selection processes in parallel."""

MEAN = 4
"""Keys in a mean: consecutive keys from a multiple of MEAN on, which their mean represents when groups are chosen."""

CENTRE_START, CENTRE_END = 64, 80
"""The keys, one group, whose mean is subtracted from all means: behind the attention sinks, which are unlike others."""

FP8_UNIT = 4.0
"""Means and query rows in FP8 are stored divided by this power of two. So keys and queries of up to 1792 do not
saturate, and their usual magnitudes lie where FP8's relative error is smallest."""

FP8_MAX = 448.0
"""The largest number of FP8."""

MASS_CODES = 256
"""How many values a mass code can have; 0 stands for no mass. See minference_vllm.reference.codes."""

CODES_PER_OCTAVE = 8
"""Mass codes for each factor of two: neighbours differ by 7 to 12%, less than the error of the estimate."""

OCTAVES_BELOW_ONE = 26
"""Masses up to about 2^-26 count as nothing. The largest code stands for 58 and more; the largest mass is 64, if each
of 16 rows gives each of a group's 4 means 1."""

HELD_OUT_ROWS = 64
"""How many query rows are measured for recall, in each part of a chunk; see recall.parts_of."""

LIST_BYTES = 256 * 2**20
"""Most memory for lists of groups. In the longest prompts this lowers the number of groups that a tile can list."""

MASS_BYTES = 136 * 2**20
"""Most memory for mass codes. If the codes of all heads do not fit, heads choose in turns. With chunks of 16,384 rows
and 32 heads they fit up to 131,072 tokens."""


@dataclass(frozen=True, slots=True)
class ScratchShape:
    """What the size of scratch depends on: a layer's heads on this tensor-parallel rank, the longest request and chunk.

    Lengths are in tokens. `dtype` is the model's; the cache, and the queries with it, may be in FP8. `sinks_dtype` is
    the dtype of Chunk.sinks: no size depends on it, but kernels are compiled for it.
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
    """Counters of the selection.

    Attributes:
        histogram: [num_heads, SELECT_BINS] int32, entries of a row by weight.
        counts: [num_heads, SELECT_SPLITS, 2] int32, entries of a range above and at the threshold.
        totals: [num_heads, SELECT_SPLITS] int64, mass of a range (unit: MASS_UNIT); used by share_sizes only.
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
        lse: [num_qo_heads, max_chunk] float32, natural log-sum-exp of every row over its kept keys, learned sinks left
            out.
        kept_pairs: [1] int64, row-key pairs attended to since the start; only ever added to.
        tile_counter: [1] int32, zero between launches: the CUDA kernel's thread blocks take the numbers of their tiles
            from it.
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
    """Recall of all layers, measured since the start, in one tensor, so that one copy brings it to the host.

    Attributes:
        flat: [num_buckets + num_layers * (2 + 2 * num_qo_heads)] float64; the other attributes are views of it.
        histogram: [num_buckets] number of recalls in each bucket, see recall.Recall.
        layers: [num_layers, 2 + 2 * num_qo_heads] all that is below, one contiguous row a layer.
        chunks: [num_layers] chunks measured.
        redone: [num_layers] how many times a head attended again to a chunk, to all keys.
        sums: [num_layers, num_qo_heads] sum of the recalls.
        worst: [num_layers, num_qo_heads] smallest recall, 1 before the first.
    """

    flat: torch.Tensor
    histogram: torch.Tensor
    layers: torch.Tensor
    chunks: torch.Tensor
    redone: torch.Tensor
    sums: torch.Tensor
    worst: torch.Tensor

    @classmethod
    def of(cls, flat: torch.Tensor, num_layers: int, num_heads: int) -> "RecallTotals":
        """The views of `flat`."""
        layers = flat[NUM_BUCKETS:].view(num_layers, 2 + 2 * num_heads)
        chunks, redone, sums, worst = layers.split([1, 1, num_heads, num_heads], dim=1)
        return cls(flat, flat[:NUM_BUCKETS], layers, chunks.squeeze(1), redone.squeeze(1), sums, worst)

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
        recall: [num_qo_heads] float32, recall of each head in the chunk measured last; until the chunk's last part is
            measured, the sum of its rows' recalls so far.
        lost: [num_qo_heads] int32, how many held-out rows of the parts measured so far are below the floor for rows.
        heads: [num_qo_heads] int32, heads that are below a floor, in any order; valid up to num_heads.
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
