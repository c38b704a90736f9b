# SPDX-License-Identifier: Apache-2.0
"""Vertical-slash (arXiv 2407.02490, section 3.2): the key columns and diagonals that probe rows weigh most."""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from minference_vllm import ops
from minference_vllm.chunk import Chunk
from minference_vllm.index import BAND, BANDS_PER_TILE, TILE, BandIndex
from minference_vllm.methods.base import MAX_TOKENS, Method, MethodSettings
from minference_vllm.scratch import ProbeBuffers, ScratchShape, SelectBuffers

PROBE_ROWS = 64
"""Rows in one group of probe rows (arXiv 2407.02490, section 3.2: the last 64 queries)."""


class VerticalSlashSettings(MethodSettings):
    """Settings of `vertical_slash`. Units are tokens unless a field says otherwise."""

    name: Literal["vertical_slash"] = "vertical_slash"
    """Which method these are the settings of."""

    probe_rows: Literal["last", "spread", "both"] = "last"
    """Which 64 query rows of a chunk estimate its pattern: its last ones, 64 spread evenly over it, or both (128)."""

    vertical_size: int = Field(default=1000, ge=1, le=MAX_TOKENS)
    """Key columns kept for every row of the chunk, for each query head."""

    slash_size: int = Field(default=6096, ge=1, le=MAX_TOKENS)
    """Diagonals (constant row minus column) kept, for each query head."""

    sink_tokens: int = Field(default=30, ge=0, le=MAX_TOKENS)
    """First key columns that are always kept; they count towards vertical_size."""

    local_tokens: int = Field(default=100, ge=1, le=MAX_TOKENS)
    """Diagonals nearest to the row that are always kept; they count towards slash_size."""

    @property
    def probe_counts(self) -> tuple[int, int]:
        """How many probe rows are the chunk's last ones, and how many lie spread over it."""
        last = PROBE_ROWS if self.probe_rows in ("last", "both") else 0
        spread = PROBE_ROWS if self.probe_rows in ("spread", "both") else 0
        return last, spread


@dataclass(frozen=True, slots=True)
class VerticalSlashBuffers:
    """Scratch of `vertical_slash`.

    Attributes:
        slash_indptr: [num_qo_heads, max_bands + BANDS_PER_TILE + 1] int32, kept diagonals smaller than BAND * j.
        index: what `choose` returns a part of.
    """

    probe: ProbeBuffers
    select: SelectBuffers
    slash_indptr: torch.Tensor
    index: BandIndex


class VerticalSlash(Method):
    """Columns and diagonals by the attention mass of 64 or 128 probe rows, as many as the budgets say."""

    Settings = VerticalSlashSettings
    settings: VerticalSlashSettings

    def scratch(self, shape: ScratchShape, device: torch.device) -> VerticalSlashBuffers:
        heads = shape.num_qo_heads
        tiles = -(-shape.max_seq_len // TILE)
        length, bands = tiles * TILE, tiles * BANDS_PER_TILE

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return VerticalSlashBuffers(
            probe=ProbeBuffers.allocate(heads, sum(self.settings.probe_counts), length, device),
            select=SelectBuffers.allocate(heads, device),
            slash_indptr=zeros(heads, bands + BANDS_PER_TILE + 1),
            index=BandIndex(
                bands=zeros(heads, 3, bands),
                bands_indptr=zeros(heads, 3, tiles + 1),
                band_halves=zeros(heads, bands + 1, dtype=torch.uint8),
                columns=zeros(heads, min(self.settings.vertical_size, length)),
                columns_indptr=zeros(heads, tiles + 1),
            ),
        )

    def budgets(self, num_qo_heads: int, device: torch.device) -> torch.Tensor:
        """[num_qo_heads, 2] int32: how many columns and how many diagonals each head keeps."""
        sizes = (self.settings.vertical_size, self.settings.slash_size)
        return torch.tensor(sizes, dtype=torch.int32, device=device).repeat(num_qo_heads, 1)

    def choose(self, chunk: Chunk, budgets: torch.Tensor, buffers: VerticalSlashBuffers) -> BandIndex:
        """See Method.choose. A head keeps at most the settings' vertical_size columns, whatever its budget."""
        ops.probe(chunk, *self.settings.probe_counts, buffers.probe, self.kernel)
        return self.index_masses(chunk.seq_len, budgets, buffers)

    def index_masses(self, seq_len: int, budgets: torch.Tensor, buffers: VerticalSlashBuffers) -> BandIndex:
        """Index the heaviest columns and diagonals.

        Args:
            seq_len: keys of the request, the chunk's own included.
            budgets: [num_qo_heads, 2] int32, columns and diagonals that each head keeps.
            buffers: hold the masses of columns and diagonals.
        """
        full, settings, kernel = buffers.index, self.settings, self.kernel
        last_tile = (seq_len - 1) // TILE
        num_bands = last_tile * BANDS_PER_TILE
        index = BandIndex(
            bands=full.bands,
            bands_indptr=full.bands_indptr[:, :, : last_tile + 1],
            band_halves=full.band_halves,
            columns=full.columns,
            columns_indptr=full.columns_indptr[:, : last_tile + 1],
        )
        slash_indptr = buffers.slash_indptr[:, : num_bands + BANDS_PER_TILE + 1]
        vertical, slash = buffers.probe.vertical, buffers.probe.slash
        keep_columns, keep_slashes = budgets.unbind(1)
        ops.select(
            vertical, seq_len, keep_columns, settings.sink_tokens, index.columns_indptr, TILE, index.columns,
            buffers.select, kernel,
        )  # fmt: skip
        ops.select(
            slash, seq_len, keep_slashes, settings.local_tokens, slash_indptr, BAND, None, buffers.select, kernel
        )
        ops.band_lists(slash_indptr, num_bands, index.bands, index.bands_indptr, index.band_halves, kernel)
        return index
