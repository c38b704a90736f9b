# SPDX-License-Identifier: Apache-2.0
"""Vertical-slash (arXiv 2407.02490, section 3.2): keep the key columns and diagonals with most attention of probe rows.

Their number is fixed by the settings or a pattern file, or is such that they hold a share of the probe rows' attention
(arXiv 2502.20766).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from minference_vllm import ops
from minference_vllm.chunk import Chunk
from minference_vllm.index import BAND, BANDS_PER_TILE, TILE, BandIndex
from minference_vllm.methods.base import MAX_TOKENS, Method, MethodSettings
from minference_vllm.scratch import ProbeBuffers, ScratchShape, SelectBuffers

PROBE_ROWS = 64
"""Rows in one group of probe rows (arXiv 2407.02490, section 3.2: the last 64 queries)."""

VERTICAL_SIZE, SLASH_SIZE = 1000, 6096
"""Columns and diagonals that a head keeps if neither sizes nor a share are given."""


class VerticalSlashSettings(MethodSettings):
    """Settings of `vertical_slash`. Units are tokens unless a field says otherwise."""

    name: Literal["vertical_slash"] = "vertical_slash"
    """Which method these are the settings of."""

    probe_rows: Literal["last", "spread", "both"] = "last"
    """Which 64 query rows of a chunk estimate its pattern: its last ones, 64 spread evenly over it, or both (128)."""

    share: float | None = Field(default=None, gt=0, le=1)
    """Share of the probe rows' attention that the kept columns must hold, and that the kept diagonals must hold, each
    counted separately. Columns and diagonals that are always kept count towards it. No unit. Null: fixed sizes."""

    vertical_size: int = Field(default=VERTICAL_SIZE, ge=1, le=MAX_TOKENS)
    """How many key columns each query head keeps for every row of the chunk. With a share this is an upper bound, and
    if it is not given there is no bound: a head that attends to all keys alike needs that share of all columns, and
    with a bound of 1000 it would silently hold less. The list of columns is sized by it, and takes 16 MiB for 32 heads
    and 131,072 tokens if there is no bound."""

    slash_size: int = Field(default=SLASH_SIZE, ge=1, le=MAX_TOKENS)
    """How many diagonals (constant row minus column) each query head keeps. With a share this is an upper bound, and if
    it is not given there is no bound."""

    sink_tokens: int = Field(default=30, ge=0, le=MAX_TOKENS)
    """First key columns that are always kept, as far as vertical_size allows: they count towards it."""

    local_tokens: int = Field(default=100, ge=1, le=MAX_TOKENS)
    """Diagonals nearest to the row that are always kept, as far as slash_size allows: they count towards it."""

    @model_validator(mode="before")
    @classmethod
    def _share_alone(cls, settings: Any) -> Any:
        """With a share, a size that is not given is no bound. It is set here so that the log and copies show it."""
        if isinstance(settings, dict) and settings.get("share") is not None:
            return {"vertical_size": MAX_TOKENS, "slash_size": MAX_TOKENS, **settings}
        return settings

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
        sizes: [num_qo_heads, 2] int32, columns and diagonals that hold the share of each head; read with a share only.
        forced: [2] int32, the settings' first columns and nearest diagonals; read with a share only.
        slash_indptr: [num_qo_heads, max_bands + BANDS_PER_TILE + 1] int32, how many kept diagonals are smaller than
            BAND * j.
        index: `choose` returns a part of it.
    """

    probe: ProbeBuffers
    select: SelectBuffers
    sizes: torch.Tensor
    forced: torch.Tensor
    slash_indptr: torch.Tensor
    index: BandIndex


class VerticalSlash(Method):
    """Columns and diagonals by attention mass of 64 or 128 probe rows: a fixed number, or as many as hold a share."""

    Settings = VerticalSlashSettings
    settings: VerticalSlashSettings

    @property
    def forced(self) -> tuple[int, int]:
        """First columns and nearest diagonals that every head keeps by the settings."""
        return self.settings.sink_tokens, self.settings.local_tokens

    def scratch(self, shape: ScratchShape, device: torch.device) -> VerticalSlashBuffers:
        heads = shape.num_qo_heads
        tiles = -(-shape.max_seq_len // TILE)
        length, bands = tiles * TILE, tiles * BANDS_PER_TILE

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        return VerticalSlashBuffers(
            probe=ProbeBuffers.allocate(heads, sum(self.settings.probe_counts), length, device),
            select=SelectBuffers.allocate(heads, device),
            sizes=zeros(heads, 2),
            forced=torch.tensor(self.forced, dtype=torch.int32, device=device),
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
        """What each head keeps.

        Returns:
            With a share [num_qo_heads, 2] float32: of columns, and of diagonals. Else [num_qo_heads, 4] int32: how many
            columns, how many diagonals, and how many of them are the first columns and the nearest diagonals.
        """
        settings = self.settings
        if settings.share is not None:
            return torch.full((num_qo_heads, 2), settings.share, dtype=torch.float32, device=device)
        sizes = (settings.vertical_size, settings.slash_size, *self.forced)
        return torch.tensor(sizes, dtype=torch.int32, device=device).repeat(num_qo_heads, 1)

    def choose(self, chunk: Chunk, budgets: torch.Tensor, buffers: VerticalSlashBuffers) -> BandIndex:
        """See Method.choose. A head keeps at most the settings' vertical_size columns, whatever its budget."""
        ops.probe(chunk, *self.settings.probe_counts, buffers.probe, self.kernel)
        return self.index_masses(chunk.seq_len, budgets, buffers)

    def index_masses(self, seq_len: int, budgets: torch.Tensor, buffers: VerticalSlashBuffers) -> BandIndex:
        """Index the heaviest columns and diagonals.

        Args:
            seq_len: keys of the request, the chunk's own included.
            budgets: see `budgets`.
            buffers: hold the masses of columns and diagonals.
        """
        full, kernel = buffers.index, self.kernel
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
        keep_columns, keep_slashes, first_columns, nearest = self.sizes(seq_len, budgets, buffers)
        ops.select(
            vertical, seq_len, keep_columns, first_columns, index.columns_indptr, TILE, index.columns,
            buffers.select, kernel,
        )  # fmt: skip
        ops.select(slash, seq_len, keep_slashes, nearest, slash_indptr, BAND, None, buffers.select, kernel)
        ops.band_lists(slash_indptr, num_bands, index.bands, index.bands_indptr, index.band_halves, kernel)
        return index

    def sizes(
        self, seq_len: int, budgets: torch.Tensor, buffers: VerticalSlashBuffers
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """How many columns and diagonals to keep, fixed or by the share in the budgets, and how many always stay.

        Returns:
            Four times [num_qo_heads] int32, see `budgets`.
        """
        settings, probe = self.settings, buffers.probe
        if settings.share is None:
            columns, slashes, first_columns, nearest = budgets.unbind(1)
            return columns, slashes, first_columns, nearest
        first_columns, nearest = buffers.forced.expand(len(budgets), 2).unbind(1)
        columns, slashes = buffers.sizes.unbind(1)
        rows = (
            (probe.vertical, budgets[:, 0], first_columns, settings.vertical_size, columns),
            (probe.slash, budgets[:, 1], nearest, settings.slash_size, slashes),
        )
        for mass, share, forced, max_keep, keep in rows:
            ops.share_sizes(mass, seq_len, share, forced, max_keep, keep, buffers.select, self.kernel)
        return columns, slashes, first_columns, nearest
