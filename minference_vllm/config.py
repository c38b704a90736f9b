# SPDX-License-Identifier: Apache-2.0
"""The configuration object: the settings, their bounds, and where they are read from."""

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
MOST_FAULTS = 8  # most errors that one message names

SETTINGS: tuple[type[MethodSettings], ...] = (*(method.Settings for method in METHODS), AutoSettings)
"""The settings classes of everything that the setting `method` may name."""

if TYPE_CHECKING:
    AnySettings = MethodSettings
else:  # made from METHODS, so that a new method is named only there; the JSON schema lists the last one first
    AnySettings = Annotated[
        Union[(*(method.Settings for method in reversed(METHODS)), AutoSettings)], Field(discriminator="name")
    ]

METHOD_NAMES: tuple[str, ...] = tuple(settings.model_fields["name"].default for settings in SETTINGS)


class MInferenceConfig(BaseModel):
    """Settings of sparse prefill, validated and frozen. Units are tokens unless a field says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    min_seq_len: int = Field(default=16384, ge=0, le=MAX_TOKENS)
    """The gate: a chunk runs sparse once its context plus its own rows reach this many tokens. At the default and
    above, both methods are clearly faster than dense attention on an H100 (32 query heads, 8 KV heads of 128);
    `minference-vllm tune` finds the length from which this holds on your GPU."""

    min_chunk: int = Field(default=1024, ge=1, le=MAX_TOKENS)
    """Chunks with fewer rows than this run dense: choosing the keys would cost more than it saves."""

    method: AnySettings = BlockSettings()
    """How the kept keys are chosen: a method's name, or an object of its name and settings. "auto" takes a pattern file
    for the model, which says how much each head keeps by vertical_slash or block; if there is no such file, it is
    block."""

    measure_recall: bool = True
    """Measure, for each head, how much of the attention of 64 rows of each chunk lies on the keys that the head kept.
    Chunks of more than 8,192 rows are divided into equal parts of at most that many, and 64 rows of each part are
    measured. Without this there is no guard."""

    recall_floor: float = Field(default=0.6, ge=0, le=1)
    """The guard: if the kept keys of a head hold less than this share of the measured rows' attention, on average over
    the rows, the head attends to all keys instead, in the same chunk. No unit; with 0 there is no floor, and recall is
    still measured."""

    row_recall_floor: float = Field(default=0.15, ge=0, le=1)
    """A second floor of the guard, for single rows: a head also attends to all keys if its kept keys hold less than
    this share of the attention of at least two measured rows. No unit; with 0 there is no such floor."""

    dense_layers: int = Field(default=0, ge=0, le=10_000)
    """How many layers, from the model's first on, always run dense."""

    kernel: Literal["auto", "cuda", "triton", "reference"] = "auto"
    """Which kernels run the sparse path: "cuda" needs an H100 or H200 and must have been built, "triton" needs a GPU,
    "reference" (plain torch) runs anywhere. "auto" takes the first of these three that can run."""

    page_salt: Literal["off", "method", "server"] = "off"
    """What vLLM's hashes of KV cache pages depend on, beside the tokens. "off": nothing else, so prefix caches and
    shared stores cannot tell sparse pages from dense ones. "method": also the settings that decide what pages hold, and
    the content of the pattern file, so that only servers with the same settings share pages. "server": also a random
    number that changes at each start, so that pages are shared neither with other servers nor with this one after a
    restart."""

    log_every: float = Field(default=60.0, ge=0, le=86_400, allow_inf_nan=False)
    """Seconds between log lines that say what ran sparse, when there was prefill; 0 turns them off."""

    debug: bool = False
    """For finding faults; slow. Each index and output is checked, and an exception of the sparse path is raised instead
    of being logged while the rows run dense."""

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
        """A copy for the log, which may leave the machine: files are named without their folders."""
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


def misplaced(additional_config: Mapping[str, Any] | None) -> str | None:
    """What is wrong with a `--additional-config` whose settings stand where they are not read; None if nothing is.

    It cannot be refused: all keys beside ours belong to others.
    """
    given = list(map(str, additional_config or {}))
    if CONFIG_KEY in given:
        return None
    if wrong := next((key for key in given if key.lower() == CONFIG_KEY), None):
        return f'--additional-config has "{wrong}", which is not read: write "{CONFIG_KEY}".'
    if wrong := next((key for key in given if key in MInferenceConfig.model_fields), None):
        example = f'{{"{CONFIG_KEY}": {{"{wrong}": …}}}}'
        return f'--additional-config has "{wrong}" where it is not read: write {example}.'
    return None


def _read_file(path: str) -> dict[str, Any]:
    name = f"{CONFIG_FILE_VARIABLE}={path}"
    settings = parse_json(read_file(Path(path), name), name)
    if not isinstance(settings, dict):
        raise ConfigError(f"{name} holds {type(settings).__name__}: it must hold a JSON object.")
    return settings


def _sentence(error: ValidationError) -> str:
    """One sentence for each error: the field, what was given, what is allowed."""
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
    """The allowed values of a numeric setting, in words; empty for other settings.

    Args:
        schema: the JSON schema of the setting.
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
    """The path of the bad field as the user wrote it: pydantic adds the method's name after `method`."""
    return [part for at, part in enumerate(loc) if at != 1 or part not in METHOD_NAMES]


def _own_settings(settings: type[MethodSettings]) -> set[str]:
    return settings.model_fields.keys() - MethodSettings.model_fields.keys()


def _method_settings(fault: dict[str, Any]) -> type[MethodSettings]:
    """The settings class of the method that the bad field belongs to."""
    named = [settings for settings in SETTINGS if settings.model_fields["name"].default in fault["loc"]]
    return named[0] if named else SETTINGS[0]
