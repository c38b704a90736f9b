# SPDX-License-Identifier: Apache-2.0
"""The pattern file of a model, JSON: how much each query head of each layer keeps. It is checked when it is read."""

from codecs import BOM_UTF8
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from minference_vllm.errors import ConfigError, shortened
from minference_vllm.files import parse_json, read_file
from minference_vllm.methods import MAX_TOKENS

MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM, MAX_NAMES = 1000, 1024, 4096, 64
MOST_FAULTS = 3  # that one message names

DENSE: Literal["dense"] = "dense"
A_SHAPE: Literal["a_shape"] = "a_shape"
HEADS = "heads"

Size = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Text = Annotated[str, StringConstraints(max_length=1000)]


def _as_one_sentence(value: Any, handler: Any) -> Any:
    """Without it a bad head is reported once for each form that it might have had."""
    try:
        return handler(value)
    except ValidationError:
        allowed = 'a head is [columns, diagonals] or ["a_shape", first keys, nearest keys], each 1 to {most}'
        raise PydanticCustomError("head", allowed, {"most": MAX_TOKENS}) from None


# Not strict: a validator in Python sees JSON's arrays as lists. Their entries still are.
Sizes = Annotated[tuple[Size, Size], Field(strict=False)]
AShape = Annotated[tuple[Literal["a_shape"], Size, Size], Field(strict=False)]
Head = Annotated[Sizes | AShape, WrapValidator(_as_one_sentence)]
Heads = Annotated[tuple[Head, ...], Field(min_length=1, max_length=MAX_HEADS)]
Layer = Annotated[
    Annotated[Literal["dense"], Tag(DENSE)] | Annotated[Heads, Tag(HEADS)],
    Discriminator(lambda layer: DENSE if isinstance(layer, str) else HEADS),
]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Geometry(_Strict):
    """What a model must be for a pattern file to fit it, whatever its name."""

    num_layers: int = Field(ge=1, le=MAX_LAYERS)
    """Hidden layers of the whole model."""

    num_qo_heads: int = Field(ge=1, le=MAX_HEADS)
    """Query heads of a layer, of all tensor-parallel ranks together."""

    num_kv_heads: int = Field(ge=1, le=MAX_HEADS)
    """KV heads of a layer, of all tensor-parallel ranks together."""

    head_dim: int = Field(ge=1, le=MAX_HEAD_DIM)
    """Size of a head."""

    def differences(self, other: "Geometry") -> list[str]:
        """What differs, with both numbers, those of this one first."""
        return [
            f"{name} {getattr(self, name)}, not {getattr(other, name)}"
            for name in type(self).model_fields
            if getattr(self, name) != getattr(other, name)
        ]


class Provenance(_Strict):
    """Where the numbers are from."""

    source: Text
    """Who found them: a release, a paper, a run of a search."""

    file: Text = ""
    """Which file of it."""

    sha256: str = Field(default="", pattern="^([0-9a-f]{64})?$")
    """Of that file."""

    licence: Text = ""
    """Of the numbers."""

    notes: Annotated[tuple[Text, ...], Field(max_length=MAX_NAMES)] = ()
    """What was changed on the way here, and what the source means otherwise than this package."""


class PatternMethod(_Strict):
    """What all heads share: settings of vertical_slash, as there."""

    name: Literal["vertical_slash"] = "vertical_slash"
    """The one method that a pattern file can give sizes to."""

    probe_rows: Literal["last", "spread", "both"] = "last"
    """Which 64 query rows of a chunk estimate its pattern."""

    sink_tokens: int = Field(default=30, ge=0, le=MAX_TOKENS)
    """First key columns that are always kept; they count towards a head's columns."""

    local_tokens: int = Field(default=100, ge=1, le=MAX_TOKENS)
    """Diagonals nearest to the row that are always kept; they count towards a head's diagonals."""


class PatternFile(_Strict):
    """How much each head of a model keeps in sparse prefill."""

    version: Literal[1]
    """Of this format."""

    models: Annotated[tuple[Annotated[str, StringConstraints(min_length=1, max_length=256)], ...], Field(max_length=64)]
    """Names of models that the method "auto" uses this file for, as on the hub. What stands before a name's last slash,
    and upper and lower case, do not matter. None: the file is used where it is named."""

    geometry: Geometry
    provenance: Provenance
    method: PatternMethod = PatternMethod()

    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=MAX_LAYERS)]
    """Of the whole model, in order. A layer is "dense", or a list of its query heads. A head is [columns, diagonals],
    how many of each it keeps, or ["a_shape", first keys, nearest keys]: these and nothing else."""

    @model_validator(mode="after")
    def _holds_what_it_says(self) -> "PatternFile":
        geometry, found = self.geometry, len(self.layers)
        if found != geometry.num_layers:
            given = {"says": geometry.num_layers, "found": found}
            raise PydanticCustomError("layers", "geometry.num_layers is {says}, and layers are {found}", given)
        for index, layer in enumerate(self.layers):
            if layer != DENSE and len(layer) != geometry.num_qo_heads:
                given = {"says": geometry.num_qo_heads, "index": index, "found": len(layer)}
                raise PydanticCustomError(
                    "heads", "geometry.num_qo_heads is {says}, and layer {index} has {found}", given
                )
        if geometry.num_qo_heads % geometry.num_kv_heads:
            given = {"qo": geometry.num_qo_heads, "kv": geometry.num_kv_heads}
            raise PydanticCustomError("heads", "{qo} query heads are no multiple of {kv} KV heads", given)
        return self

    @property
    def dense_layers(self) -> frozenset[int]:
        return frozenset(index for index, layer in enumerate(self.layers) if layer == DENSE)

    @property
    def largest(self) -> tuple[int, int]:
        """The most columns and the most diagonals that a head keeps; 1 where all layers are dense."""
        rows = [self.budget(head) for layer in self.layers if layer != DENSE for head in layer]
        return max((row[0] for row in rows), default=1), max((row[1] for row in rows), default=1)

    def budget(self, head: Any) -> tuple[int, int, int, int]:
        """A head's budget, see VerticalSlash.budgets: of the first keys and the nearest alone all is forced."""
        if head[0] == A_SHAPE:
            return head[1], head[2], head[1], head[2]
        return head[0], head[1], self.method.sink_tokens, self.method.local_tokens


def read_pattern(path: Path) -> PatternFile:
    """Read a pattern file.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    return parse_pattern(read_file(path, f"The pattern file {path}"), str(path))


def parse_pattern(content: bytes | str, name: str) -> PatternFile:
    """A pattern file of this content; `name` is how messages name it.

    Raises:
        ConfigError: it is none.
    """
    try:
        # pydantic reads JSON by looser rules, and numbers and lists of Python by stricter ones.
        parse_json(content, "It")
        return PatternFile.model_validate_json(
            content.removeprefix(BOM_UTF8) if isinstance(content, bytes) else content
        )
    except ValidationError as error:
        faults = error.errors(include_url=False)
        sentences = [_describe(dict(fault)) for fault in faults[:MOST_FAULTS]]
        if more := len(faults) - len(sentences):
            sentences.append(f"{more} more faults.")
        raise ConfigError(f"The pattern file {name} cannot be used. {' '.join(sentences)}") from None
    except ConfigError as error:
        raise ConfigError(f"The pattern file {name} cannot be used. {error}") from None


def _describe(fault: dict[str, Any]) -> str:
    where, message = _path(fault["loc"]), fault["msg"]
    if not where:  # of the file as a whole: not JSON, no object, or its parts disagree
        return f"{message}."
    if fault["type"] == "missing":
        return f"{where} is missing."
    if fault["type"] == "extra_forbidden":
        return f"{where} is no field of a pattern file."
    return f"{where}={shortened(fault['input'])}: {message[0].lower()}{message[1:]}."


def _path(loc: Sequence[int | str]) -> str:
    """Where a fault lies, as in the file: pydantic puts the form of a layer between its number and its heads."""
    is_in_layer = len(loc) > 2 and loc[0] == "layers"
    return ".".join(shortened(part, str) for part in (*loc[:2], *loc[3 if is_in_layer else 2 :]))
