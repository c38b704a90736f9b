# SPDX-License-Identifier: Apache-2.0
"""The method "auto": the pattern file of the model that is served, if there is one, and else the default method."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from minference_vllm.errors import ConfigError
from minference_vllm.methods import MethodSettings
from minference_vllm.methods.block import BlockSettings
from minference_vllm.patterns import shipped
from minference_vllm.patterns.file import DENSE, Geometry, PatternFile, read_pattern
from minference_vllm.patterns.shared import TAKES

OTHERWISE = 'Name another file as {"name": "auto", "pattern_file": PATH}, or choose the method block.'


class AutoSettings(MethodSettings):
    """Settings of `auto`, which is no method of its own: it stands for one that fits the model."""

    name: Literal["auto"] = "auto"

    pattern_file: str | None = Field(default=None, min_length=1, max_length=4096)
    """A pattern file, which must fit the model. Null: the one that comes with the package for a model of this name; if
    there is none, the method is block with its default settings."""

    def without_folder(self) -> "AutoSettings":
        """The same, with the file's name alone."""
        return self.model_copy(update={"pattern_file": self.pattern_file and Path(self.pattern_file).name})


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The properties of a model by which its pattern file is chosen and divided among ranks.

    Attributes:
        names: those the user gave the model: its name or path, then those it is served under.
        geometry: of the whole model.
        rank: this worker's tensor-parallel rank, which holds the rank-th share of each layer's query heads.
    """

    names: tuple[str, ...]
    geometry: Geometry
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Pattern:
    """A pattern file that fits the model, for one tensor-parallel rank."""

    file: PatternFile
    name: str
    rank: int

    @property
    def dense_layers(self) -> frozenset[int]:
        return self.file.dense_layers

    def budgets(self, layer: int | None, num_qo_heads: int) -> list[Any]:
        """Budgets of this rank's heads in a layer; `layer` counts the whole model's layers, of all pipeline stages.

        Raises:
            ConfigError: the file has no such layer, or the ranks do not share the model's heads evenly.
        """
        if layer is None or not 0 <= layer < len(self.file.layers):
            given = "A layer whose name holds no single number" if layer is None else f"Layer {layer}"
            raise ConfigError(f"{given} is none of the {len(self.file.layers)} of {self.name}. {OTHERWISE}")
        heads, first = self.file.layers[layer], self.rank * num_qo_heads
        if self.file.geometry.num_qo_heads % num_qo_heads or first + num_qo_heads > self.file.geometry.num_qo_heads:
            raise ConfigError(
                f"Layer {layer} has {num_qo_heads} query heads on tensor-parallel rank {self.rank}, which are no share "
                f"of the {self.file.geometry.num_qo_heads} in {self.name}. {OTHERWISE}"
            )
        if heads == DENSE:
            raise ConfigError(f"Layer {layer} is dense in {self.name}, and has no budgets.")
        return [self.file.budget(head) for head in heads[first : first + num_qo_heads]]


@dataclass(frozen=True, slots=True)
class Resolved:
    """The result of resolving the setting `method`.

    Attributes:
        settings: of the method that chooses keys.
        pattern: the pattern file that gives the heads' budgets, if there is one.
        why: the reason, for the log and so without folders; empty if the settings name a method themselves.
    """

    settings: MethodSettings
    pattern: Pattern | None = None
    why: str = ""

    @property
    def dense_layers(self) -> frozenset[int]:
        """Layers of the whole model that a file says are dense."""
        return self.pattern.dense_layers if self.pattern else frozenset()


def resolve(settings: MethodSettings, model: ServedModel | None) -> Resolved:
    """The method for this model; `model` is read only if the settings are "auto".

    Raises:
        ConfigError: a pattern file cannot be read, or does not fit the model.
    """
    if not isinstance(settings, AutoSettings):
        return Resolved(settings)
    if model is None:
        raise ConfigError('The method "auto" needs a model, and here is none: name block or vertical_slash.')
    if settings.pattern_file is not None:
        found = settings.pattern_file, read_pattern(Path(settings.pattern_file))
    elif (in_package := shipped.find(model.names)) is not None:
        found = in_package
    else:
        named = " or ".join(dict.fromkeys(map(shipped.shown, model.names)))
        return Resolved(BlockSettings(), why=f"no pattern file for {named}: the method is block")
    name, file = found
    if differences := file.geometry.differences(model.geometry):
        raise ConfigError(
            f"The pattern file {name} does not fit {model.names[0]}: it is for {'; '.join(differences)}. {OTHERWISE}"
        )
    pattern = Pattern(file, name, model.rank)
    takes, settings = TAKES[file.method.name], file.settings
    shown = f"the pattern file {Path(name).name} ({file.provenance.source})"
    why = f"the method is {settings.name} with the {takes} of {shown}"
    return Resolved(settings, pattern, why)
