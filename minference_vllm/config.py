# SPDX-License-Identifier: Apache-2.0
"""The one configuration object: what the user may say, its bounds, and where it is read from."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

CONFIG_FILE_VARIABLE = "MINFERENCE_CONFIG"
CONFIG_KEY = "minference"
PROBE_GROUP = 64
"""Rows in one group of probe rows (MInference, arXiv 2407.02490, section 3.2: the last 64 queries)."""


class ConfigError(ValueError):
    """A configuration that cannot be served; the message names the field, the value and what is allowed."""


class MInferenceConfig(BaseModel):
    """Settings of sparse prefill, validated and frozen. Units are tokens unless a field says otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    min_seq_len: int = Field(default=16384, ge=0)
    """The gate: a chunk goes sparse once its context plus its own rows reach this many tokens. The default is what
    `minference-vllm tune` finds on an H100 (32 query heads, 8 KV heads of 128)."""

    min_chunk: int = Field(default=1024, ge=1)
    """Chunks with fewer rows than this run dense: choosing the keys would cost more than it saves."""

    method: Literal["vertical_slash"] = "vertical_slash"
    """How the kept keys are chosen."""

    probe_rows: Literal["last", "spread", "both"] = "last"
    """Which 64 query rows of a chunk estimate its pattern: its last ones, 64 spread evenly over it, or both (128)."""

    vertical_size: int = Field(default=1000, ge=1)
    """Key columns kept for every row of the chunk, for each query head."""

    slash_size: int = Field(default=6096, ge=1)
    """Diagonals (constant row minus column) kept, for each query head."""

    sink_tokens: int = Field(default=30, ge=0)
    """First key columns that are always kept; they count towards vertical_size."""

    local_tokens: int = Field(default=100, ge=1)
    """Diagonals nearest to the row that are always kept; they count towards slash_size."""

    dense_layers: int = Field(default=0, ge=0)
    """The first layers of the model, this many, always run dense."""

    kernel: Literal["auto", "cuda", "triton", "reference"] = "auto"
    """Which code attends: "cuda" on H100 and H200 if it was built, else "triton", "reference" (torch) without a GPU."""

    log_every: float = Field(default=60.0, ge=0, allow_inf_nan=False)
    """Seconds between log lines that say what ran sparse, when there was prefill; 0 turns them off."""

    @property
    def probe_counts(self) -> tuple[int, int]:
        """How many probe rows are the chunk's last ones, and how many lie spread over it."""
        last = PROBE_GROUP if self.probe_rows in ("last", "both") else 0
        spread = PROBE_GROUP if self.probe_rows in ("spread", "both") else 0
        return last, spread


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
        raise ConfigError(f'--additional-config "{CONFIG_KEY}" is {inline!r}: it must be a JSON object of settings.')
    settings = {**from_file, **inline}
    try:
        return MInferenceConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


def _read_file(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"{CONFIG_FILE_VARIABLE}={path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"{CONFIG_FILE_VARIABLE}={path} is not valid JSON: {error}.") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{CONFIG_FILE_VARIABLE}={path} holds {type(settings).__name__}: it must hold a JSON object.")
    return settings


def _sentence(error: ValidationError) -> str:
    """One sentence a fault: the field, what was given, what is allowed."""
    faults = []
    for fault in error.errors():
        field = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            allowed = ", ".join(MInferenceConfig.model_fields)
            faults.append(f"minference.{field} is not a setting; the settings are {allowed}.")
        else:
            reason = fault["msg"][0].lower() + fault["msg"][1:]
            faults.append(f"minference.{field}={fault['input']!r} is not allowed: {reason}.")
    return " ".join(faults)
