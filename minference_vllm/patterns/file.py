# SPDX-License-Identifier: Apache-2.0
"""The pattern file of a model, JSON: how much each query head of each layer keeps. It is checked when it is read."""

from codecs import BOM_UTF8
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
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
from minference_vllm.methods.block import BlockSettings
from minference_vllm.methods.vertical_slash import VerticalSlashSettings
from minference_vllm.patterns.shared import TAKES, PatternMethod, PatternShares, PatternSizes, Strict

MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM, MAX_NAMES = 1000, 1024, 4096, 64
MOST_FAULTS = 3  # the most that one message names

DENSE: Literal["dense"] = "dense"
HEADS = "heads"

Size = Annotated[int, Field(ge=1, le=MAX_TOKENS)]
Text = Annotated[str, StringConstraints(max_length=1000)]


def _as_one_sentence(value: Any, handler: Any) -> Any:
    """Reports a bad head in one sentence; pydantic would report it once for each form that a head may have."""
    try:
        return handler(value)
    except ValidationError:
        allowed = 'a head is [columns, diagonals] or ["a_shape", first keys, nearest keys], each 1 to {most}, '
        allowed += "or a share above 0 and up to 1"
        raise PydanticCustomError("head", allowed, {"most": MAX_TOKENS}) from None


# Not strict, because a validator in Python sees JSON's arrays as lists. The entries are still checked strictly.
Sizes = Annotated[tuple[Size, Size], Field(strict=False)]
AShape = Annotated[tuple[Literal["a_shape"], Size, Size], Field(strict=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Head = Annotated[Sizes | AShape | Share, WrapValidator(_as_one_sentence)]
Heads = Annotated[tuple[Head, ...], Field(min_length=1, max_length=MAX_HEADS)]
Layer = Annotated[
    Annotated[Literal["dense"], Tag(DENSE)] | Annotated[Heads, Tag(HEADS)],
    Discriminator(lambda layer: DENSE if isinstance(layer, str) else HEADS),
]


class Geometry(Strict):
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


class Provenance(Strict):
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


class PatternFile(Strict):
    """How much each head of a model keeps in sparse prefill."""

    version: Literal[1]
    """Of this format."""

    models: Annotated[tuple[Annotated[str, StringConstraints(min_length=1, max_length=256)], ...], Field(max_length=64)]
    """Names of models that the method "auto" uses this file for, as on the hub. What stands before a name's last slash,
    and upper and lower case, do not matter. None: the file is used where it is named."""

    geometry: Geometry
    provenance: Provenance
    method: PatternMethod = PatternSizes()

    layers: Annotated[tuple[Layer, ...], Field(min_length=1, max_length=MAX_LAYERS)]
    """Of the whole model, in order. A layer is "dense", or a list of its query heads. A head of vertical_slash is
    [columns, diagonals], how many of each it keeps, or ["a_shape", first keys, nearest keys]: these and nothing else. A
    head of block is the share of the attention that it keeps."""

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
        takes_shares, name = isinstance(self.method, PatternShares), self.method.name
        for index, layer in enumerate(self.layers):
            if layer != DENSE and any(isinstance(head, float) != takes_shares for head in layer):
                of = {"name": name, "takes": TAKES[name], "index": index}
                raise PydanticCustomError("heads", "heads of {name} are {takes}, and layer {index} has another", of)
        return self

    @property
    def dense_layers(self) -> frozenset[int]:
        return frozenset(index for index, layer in enumerate(self.layers) if layer == DENSE)

    @property
    def settings(self) -> VerticalSlashSettings | BlockSettings:
        """The method's settings, with limits that no head exceeds."""
        return self.method.settings([head for layer in self.layers if layer != DENSE for head in layer])

    def budget(self, head: Any) -> Any:
        """The row of a layer's budgets for a head, see Method.budgets."""
        return self.method.budget(head)


def read_pattern(path: Path) -> PatternFile:
    """Read a pattern file.

    Raises:
        ConfigError: the file cannot be read, or is no pattern file.
    """
    return parse_pattern(read_file(path, f"The pattern file {path}"), str(path))


def parse_pattern(content: bytes | str, name: str) -> PatternFile:
    """A pattern file of this content; `name` is how messages name it.

    ConfigError: it is no pattern file.
        ConfigError: it is none.
    """
    try:
        # pydantic accepts JSON that parse_json refuses. Its own reading is used, because it is too strict with numbers
        # and lists that Python has read.
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
    """The place of a fault in the file, without what pydantic adds: the form of a layer, and the name of the method."""
    added = {"layers": 2, "method": 1}.get(str(loc[0])) if loc else None
    parts = [part for at, part in enumerate(loc) if at != added]
    return ".".join(shortened(part, str) for part in parts)
