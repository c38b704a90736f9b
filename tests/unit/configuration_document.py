# SPDX-License-Identifier: Apache-2.0
"""Makes docs/configuration.md from the settings' own models."""

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from minference_vllm.config import MInferenceConfig, allowed_numbers
from minference_vllm.methods import METHODS
from minference_vllm.patterns.auto import AutoSettings

WIDTH = 120
INTRODUCTION = """\
# Configuration

Made from the settings in the code by `python -m tests.unit.test_configs`: change them there.

Settings stand under `"minference"` in vLLM's `--additional-config`, or in a JSON file that `MINFERENCE_CONFIG` names.
Where both are there, a setting of the option wins over that of the file, the whole of `method` at once. What is left
out has its default. Units are tokens unless a setting says otherwise.

    vllm serve MODEL --attention-backend minference --additional-config '{"minference": {"min_seq_len": 32768}}'
    MINFERENCE_CONFIG=settings.json vllm serve MODEL --attention-backend minference

An unknown key, a wrong type or a value out of bounds stops the server with a sentence that names it. The resolved
settings are logged once, and `minference-vllm doctor` shows them without a server. [configs/](../configs) has a file
with all defaults, a JSON schema for editors, and examples for `vllm serve --config`.
"""
METHOD = """\
## Method `{name}`

Written as `"method": "{name}"` with all defaults, or as `"method": {{"name": "{name}", "{first}": …}}`.
[methods.md](methods.md) says how it chooses and what was measured.
"""
VARIABLES = """\
## Environment variables

- `MINFERENCE_CONFIG`: the file of settings. Each host reads its own: Ray's workers on other hosts are given the
  variable, not the file, and `vllm serve --headless` on another node is given neither. vLLM does not see the file. So
  what it keeps from one start to the next for the same options (the size of the KV cache, with
  `VLLM_ENABLE_STARTUP_PLAN`) it also keeps when the file has changed. Settings in `--additional-config` are part of
  these options.
- `MINFERENCE_METRICS_DIR`: the folder in which workers leave their counts for `/metrics`; `/dev/null` for no metrics.
  [metrics.md](metrics.md) says more.
- `MINFERENCE_BUILD_CUDA`: when the package is installed, `1` fails where the CUDA kernels cannot be built, and `0`
  leaves them out.
"""


def document() -> str:
    """The whole file."""
    parts = [INTRODUCTION, "## All methods\n", *_settings(MInferenceConfig)]
    for settings in (*(method.Settings for method in METHODS), AutoSettings):
        name, first, *_ = settings.model_fields
        parts.append(METHOD.format(name=settings.model_fields[name].default, first=first))
        parts += _settings(settings)
    return "\n".join([*parts, VARIABLES])


def _settings(model: type[BaseModel]) -> Iterator[str]:
    """A section each; the name of a method is no setting."""
    for name, schema in model.model_json_schema()["properties"].items():
        if name != "name":
            default = schema["default"]["name"] if name == "method" else json.dumps(schema["default"])
            meaning = textwrap.fill(" ".join(schema["description"].split()), WIDTH)
            yield f"### {name}\n\n{_allowed(schema)}; default `{default}`.\n\n{meaning}\n"


def _allowed(schema: dict[str, Any]) -> str:
    """What a setting may be, in words."""
    if "anyOf" in schema:
        return f"{_allowed(schema['anyOf'][0])}, or `null`"
    if "enum" in schema:
        return f"One of {', '.join(f'`{json.dumps(value)}`' for value in schema['enum'])}"
    if "discriminator" in schema:
        return f"One of {', '.join(f'`{name}`' for name in schema['discriminator']['mapping'])}"
    if schema["type"] == "boolean":
        return "`true` or `false`"
    if schema["type"] == "string":
        return f"Text of {schema['minLength']} to {schema['maxLength']:,} characters"
    return allowed_numbers(schema).capitalize()
