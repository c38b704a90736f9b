# SPDX-License-Identifier: Apache-2.0
"""What all heads of a pattern file share: its method, and the settings that the file does not give head by head."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from minference_vllm.methods import MAX_TOKENS
from minference_vllm.methods.block import COARSE_FROM, LONG_FROM, BlockSettings
from minference_vllm.methods.vertical_slash import VerticalSlashSettings

A_SHAPE: Literal["a_shape"] = "a_shape"

SIZES, SHARES = "vertical_slash", "block"
"""The methods that a pattern file can be for."""

TAKES = {SIZES: "sizes", SHARES: "shares"}
"""What a file says of each head."""


class Strict(BaseModel):
    """A part of a pattern file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class PatternSizes(Strict):
    """What all heads share whose sizes a file gives: settings of vertical_slash, as there."""

    name: Literal["vertical_slash"] = "vertical_slash"
    """Heads are sizes: [columns, diagonals], or of an A-shape."""

    probe_rows: Literal["last", "spread", "both"] = "last"
    """Which 64 query rows of a chunk estimate its pattern."""

    sink_tokens: int = Field(default=30, ge=0, le=MAX_TOKENS)
    """First key columns that are always kept; they count towards a head's columns."""

    local_tokens: int = Field(default=100, ge=1, le=MAX_TOKENS)
    """Diagonals nearest to the row that are always kept; they count towards a head's diagonals."""

    def settings(self, heads: Sequence[Any]) -> VerticalSlashSettings:
        """The method's settings, with sizes that none of these heads exceeds."""
        sizes = [head[-2:] for head in heads] or [(1, 1)]
        columns, diagonals = (max(size[at] for size in sizes) for at in (0, 1))
        return VerticalSlashSettings(**self.model_dump(), vertical_size=columns, slash_size=diagonals)

    def budget(self, head: Any) -> tuple[int, int, int, int]:
        """A head's row of VerticalSlash.budgets. An A-shape consists of forced keys only: the first and the nearest."""
        if head[0] == A_SHAPE:
            return head[1], head[2], head[1], head[2]
        return head[0], head[1], self.sink_tokens, self.local_tokens


class PatternShares(Strict):
    """What all heads share whose shares a file gives: settings of block, as there."""

    name: Literal["block"]
    """Heads are shares."""

    rows_per_half: Literal[16, 32, 64] = 32
    """Query rows of every 64 that choose the keys of all 64."""

    rows_per_list: Literal[64, 128] = 128
    """Query rows that keep the same groups."""

    sink_tokens: int = Field(default=64, ge=0, le=MAX_TOKENS)
    """First keys of the prompt that are always kept."""

    local_tokens: int = Field(default=128, ge=0, le=MAX_TOKENS)
    """Keys just before a tile that are always kept."""

    last_tokens: int = Field(default=64, ge=0, le=MAX_TOKENS)
    """At least so many query rows at the end of a prompt attend to all keys."""

    last_part: float = Field(default=0.002, ge=0, le=1)
    """The part of a prompt's rows that do, up to 512 rows."""

    long_from: int = Field(default=LONG_FROM, ge=0, le=MAX_TOKENS)
    """Rows with fewer keys than this before them keep more of these."""

    score_dtype: Literal["auto", "fp8", "model"] = "auto"
    """What means of keys and the rows that choose are rounded to."""

    coarse_from: int = Field(default=COARSE_FROM, ge=0, le=MAX_TOKENS)
    """From prompts of this length on, means of 32 keys are scored first."""

    max_fine: float = Field(default=0.75, gt=0, le=1)
    """Largest share of boxes that is then scored finely."""

    max_density: float = Field(default=0.5, gt=0, le=1)
    """A tile that wants more than this share of the groups keeps all."""

    def settings(self, heads: Sequence[Any]) -> BlockSettings:
        """The method's settings, with a share that none of these heads exceeds."""
        return BlockSettings(**self.model_dump(), share=max(heads, default=1.0))

    def budget(self, head: Any) -> float:
        """A head's row of Block.budgets."""
        return float(head)


def _name_of(method: Any) -> str:
    """A method's name; without one it is vertical_slash, with which the format began."""
    return str(method.get("name", SIZES) if isinstance(method, dict) else getattr(method, "name", SIZES))


PatternMethod = Annotated[
    Annotated[PatternSizes, Tag(SIZES)] | Annotated[PatternShares, Tag(SHARES)],
    Discriminator(
        _name_of, custom_error_type="method", custom_error_message=f"it takes the name {SIZES} or the name {SHARES}"
    ),
]
