# SPDX-License-Identifier: Apache-2.0
"""Scratch memory of the sparse path: claimed once, in the profiling run, and shared by all layers of a worker."""

from dataclasses import dataclass, fields

import torch

from minference_vllm.index import BAND, TILE

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


@dataclass(frozen=True, slots=True)
class Geometry:
    """What sizes a worker's scratch: query heads of this tensor-parallel rank, longest request and chunk, budgets."""

    num_qo_heads: int
    max_seq_len: int
    max_chunk: int
    num_probes: int
    max_columns: int


@dataclass(frozen=True, slots=True)
class Workspace:
    """Buffers that one chunk of one layer uses and the next one overwrites; nothing is allocated in a step.

    Attributes:
        probe_max, probe_sum: [num_qo_heads, PROBE_PARTIALS, num_probes] float32, partial softmax of the probe rows.
        probe_lse: [num_qo_heads, num_probes] float32, natural log-sum-exp of the probe rows over all their keys.
        vertical, slash: [num_qo_heads, max_len] int32, attention mass of columns and diagonals (unit: MASS_UNIT).
        select_histogram: [num_qo_heads, SELECT_BINS] int32, entries of a row by weight.
        select_counts: [num_qo_heads, SELECT_SPLITS, 2] int32, entries of a range above and at the threshold.
        columns, columns_below, bands, bands_below, band_halves: see SparseIndex.
        slash_below: [num_qo_heads, max_bands + TILE / BAND + 1] int32, kept diagonals smaller than BAND * j.
        lse: [num_qo_heads, max_chunk] float32, natural log-sum-exp of every row over its kept keys.
        kept_pairs: [1] int64, row-key pairs attended to since the start; only ever added to.
    """

    probe_max: torch.Tensor
    probe_sum: torch.Tensor
    probe_lse: torch.Tensor
    vertical: torch.Tensor
    slash: torch.Tensor
    select_histogram: torch.Tensor
    select_counts: torch.Tensor
    columns: torch.Tensor
    columns_below: torch.Tensor
    bands: torch.Tensor
    bands_below: torch.Tensor
    band_halves: torch.Tensor
    slash_below: torch.Tensor
    lse: torch.Tensor
    kept_pairs: torch.Tensor

    @classmethod
    def allocate(cls, geometry: Geometry, device: torch.device) -> "Workspace":
        """Claim every buffer for the longest request and chunk that the server admits."""
        heads = geometry.num_qo_heads
        tiles = -(-geometry.max_seq_len // TILE)
        length, bands = tiles * TILE, tiles * TILE // BAND

        def buffer(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            probe_max=buffer(heads, PROBE_PARTIALS, geometry.num_probes, dtype=torch.float32),
            probe_sum=buffer(heads, PROBE_PARTIALS, geometry.num_probes, dtype=torch.float32),
            probe_lse=buffer(heads, geometry.num_probes, dtype=torch.float32),
            vertical=buffer(heads, length),
            slash=buffer(heads, length),
            select_histogram=buffer(heads, SELECT_BINS),
            select_counts=buffer(heads, SELECT_SPLITS, 2),
            columns=buffer(heads, min(geometry.max_columns, length)),
            columns_below=buffer(heads, tiles + 1),
            bands=buffer(heads, 3, bands),
            bands_below=buffer(heads, 3, tiles + 1),
            band_halves=buffer(heads, bands + 1, dtype=torch.uint8),
            slash_below=buffer(heads, bands + TILE // BAND + 1),
            lse=buffer(heads, geometry.max_chunk, dtype=torch.float32),
            kept_pairs=buffer(1, dtype=torch.int64),
        )

    @property
    def num_bytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))
