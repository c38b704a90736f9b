# SPDX-License-Identifier: Apache-2.0
"""The one configuration object: what the user may say, its bounds, and where it is read from."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from minference_vllm.errors import ConfigError, shortened
from minference_vllm.files import parse_json, read_file
from minference_vllm.methods import MAX_TOKENS, METHODS, MethodSettings
from minference_vllm.methods.block import BlockSettings
from minference_vllm.patterns import AutoSettings

CONFIG_FILE_VARIABLE = "MINFERENCE_CONFIG"
CONFIG_KEY = "minference"
MOST_FAULTS = 8  # that one message names

SETTINGS: tuple[type[MethodSettings], ...] = (*(method.Settings for method in METHODS), AutoSettings)
"""Of everything that the setting `method` may name."""

if TYPE_CHECKING:
    AnySettings = MethodSettings
else:  # of the registry, so that a method is registered by one line there; the JSON schema lists the last one first
    AnySettings = Annotated[
        Union[(*(method.Settings for method in reversed(METHODS)), AutoSettings)], Field(discriminator="name")
    ]

METHOD_NAMES: tuple[str, ...] = tuple(settings.model_fields["name"].default for settings in SETTINGS)


class MInferenceConfig(BaseModel):
    """Settings of sparse prefill, validated and frozen. Units are tokens unless a field says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    min_seq_len: int = Field(default=16384, ge=0, le=MAX_TOKENS)
    """The gate: a chunk goes sparse once its context plus its own rows reach this many tokens. From the default on both
    methods are clearly faster than dense on an H100 (32 query heads, 8 KV heads of 128); `minference-vllm tune` finds
    where yours is."""

    min_chunk: int = Field(default=1024, ge=1, le=MAX_TOKENS)
    """Chunks with fewer rows than this run dense: choosing the keys would cost more than it saves."""

    method: AnySettings = BlockSettings()
    """How the kept keys are chosen: a method's name, or an object of its name and settings. "auto" is vertical_slash
    or block with what a pattern file gives each head of the model, where there is one, and else block."""

    measure_recall: bool = True
    """Measure, for each head, how much of the attention of 64 rows of each chunk, in long chunks of every 8,192 rows,
    lies on the keys that it kept. Without it there is no guard."""

    recall_floor: float = Field(default=0.7, ge=0, le=1)
    """The guard: a head that kept less than this share of those rows' attention, on average over them, attends to all
    keys, in the same chunk. No unit; 0 is no floor, and recall is still measured."""

    row_recall_floor: float = Field(default=0.15, ge=0, le=1)
    """The same for a head of which two of those rows are below this."""

    dense_layers: int = Field(default=0, ge=0, le=10_000)
    """The first layers of the model, this many, always run dense."""

    kernel: Literal["auto", "cuda", "triton", "reference"] = "auto"
    """Which code attends: "cuda" on H100 and H200 if it was built, else "triton", "reference" (torch) without a GPU."""

    page_salt: Literal["off", "method", "server"] = "off"
    """What the hashes by which vLLM knows pages depend on, beside the tokens in them. "off": nothing, so that prefix
    caches and shared stores take sparse pages for dense ones. "method": the settings that decide what pages hold, and
    the content of a pattern file, so that pages are shared with servers of the same settings alone. "server": a random
    number as well, so that they are shared with no other server, nor after the next start."""

    log_every: float = Field(default=60.0, ge=0, le=86_400, allow_inf_nan=False)
    """Seconds between log lines that say what ran sparse, when there was prefill; 0 turns them off."""

    debug: bool = False
    """For finding faults, slow: checks each index and output, and raises where service would run the chunk dense."""

    @field_validator("method", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        """A method's name stands for the method with its default settings."""
        settings = {"name": value} if isinstance(value, str) else value
        is_named = isinstance(settings, dict) and settings.get("name") in METHOD_NAMES
        if not is_named and not isinstance(settings, MethodSettings):
            names = " or ".join(map(repr, METHOD_NAMES))
            allowed = "it takes a method's name, {names}, or an object of the name and settings of the method"
            raise PydanticCustomError("method", allowed, {"names": names})
        return settings

    def without_folders(self) -> "MInferenceConfig":
        """The same for the log, which goes further than the machine: files by their names alone."""
        if not isinstance(self.method, AutoSettings):
            return self
        return self.model_copy(update={"method": self.method.without_folder()})


def load_config(
    additional_config: Mapping[str, Any] | None, environ: Mapping[str, str] = os.environ
) -> MInferenceConfig:
    """Resolve the configuration: defaults, then the file named by MINFERENCE_CONFIG, then `--additional-config`.

    Args:
        additional_config: vLLM's `--additional-config`; only its "minference" object is read.
        environ: the process environment.

    Raises:
        ConfigError: unknown key, wrong type, value out of bounds, unreadable or broken file.
    """
    path = environ.get(CONFIG_FILE_VARIABLE)
    from_file = _read_file(path) if path else {}
    inline = (additional_config or {}).get(CONFIG_KEY, {})
    if not isinstance(inline, Mapping):
        given = f'--additional-config "{CONFIG_KEY}" is {shortened(inline)}'
        raise ConfigError(f"{given}: it must be a JSON object of settings.")
    settings = {**from_file, **inline}
    try:
        return MInferenceConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


def _read_file(path: str) -> dict[str, Any]:
    name = f"{CONFIG_FILE_VARIABLE}={path}"
    settings = parse_json(read_file(Path(path), name), name)
    if not isinstance(settings, dict):
        raise ConfigError(f"{name} holds {type(settings).__name__}: it must hold a JSON object.")
    return settings


def _sentence(error: ValidationError) -> str:
    """One sentence a fault: the field, what was given, what is allowed."""
    faults = [dict(fault) for fault in error.errors()]
    sentences = list(map(_describe, faults[:MOST_FAULTS]))
    if more := len(faults) - len(sentences):
        sentences.append(f"{more} more settings are not allowed.")
    return " ".join(sentences)


def _describe(fault: dict[str, Any]) -> str:
    path = _without_tag(fault["loc"])
    field = ".".join([CONFIG_KEY, *(shortened(part, str) for part in path)])
    allowed: type[BaseModel] = MInferenceConfig if len(path) == 1 else _method_settings(fault)
    if fault["type"] != "extra_forbidden":
        numbers = allowed_numbers(allowed.model_json_schema()["properties"].get(path[-1], {}))
        reason = f"it takes a {numbers}" if numbers else fault["msg"][0].lower() + fault["msg"][1:]
        return f"{field}={shortened(fault['input'])} is not allowed: {reason}."
    owner = next((settings for settings in SETTINGS if path[-1] in _own_settings(settings)), None)
    if len(path) == 1 and owner:
        name = owner.model_fields["name"].default
        example = f'"method": {{"name": "{name}", "{path[0]}": {shortened(fault["input"], json.dumps)}}}'
        return f"{field} is a setting of the method {name}: write {example}."
    return f"{field} is not a setting; the settings are {', '.join(allowed.model_fields)}."


def allowed_numbers(schema: Mapping[str, Any]) -> str:
    """What a setting that is a number may be, in words; empty for others.

    Args:
        schema: of the setting, as JSON schema has it.
    """
    if "anyOf" in schema:
        numbers = allowed_numbers(schema["anyOf"][0])
        return numbers and f"{numbers}, or null"
    kind = {"integer": "whole number", "number": "number"}.get(schema.get("type", ""))
    if kind is None:
        return ""
    if "exclusiveMinimum" in schema:
        return f"{kind} above {schema['exclusiveMinimum']}, at most {schema['maximum']:,}"
    return f"{kind} from {schema['minimum']} to {schema['maximum']:,}"


def _without_tag(loc: Sequence[int | str]) -> list[int | str]:
    """Where a fault lies, as the user wrote it: pydantic puts the method's name between `method` and its settings."""
    return [part for at, part in enumerate(loc) if at != 1 or part not in METHOD_NAMES]


def _own_settings(settings: type[MethodSettings]) -> set[str]:
    return settings.model_fields.keys() - MethodSettings.model_fields.keys()


def _method_settings(fault: dict[str, Any]) -> type[MethodSettings]:
    """The settings of the method in which a fault lies."""
    named = [settings for settings in SETTINGS if settings.model_fields["name"].default in fault["loc"]]
    return named[0] if named else SETTINGS[0]
