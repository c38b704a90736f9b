# SPDX-License-Identifier: Apache-2.0
"""The pattern files that come with the package, and which of them belongs to a model."""

import json
import os
import re
from collections.abc import Iterable
from importlib.resources import files

from minference_vllm.patterns.file import PatternFile, parse_pattern

CACHED = re.compile(r"/models--(?:[^/]+--)?([^/]+)/snapshots/")
"""Where Hugging Face's cache keeps a model. Without a network, vLLM puts this path in place of the model's name."""


def shipped() -> dict[str, str]:
    """The text of each file, by its name."""
    folder = files("minference_vllm.patterns").joinpath("files")
    found = {entry.name: entry.read_text() for entry in folder.iterdir() if entry.name.endswith(".json")}
    return dict(sorted(found.items()))


def find(names: Iterable[str]) -> tuple[str, PatternFile] | None:
    """The first file for a model of one of these names, with the file's name; None if there is none."""
    wanted = {plain(name) for name in names}
    for name, text in shipped().items():
        if wanted & {plain(model) for model in json.loads(text)["models"]}:
            return name, parse_pattern(text, name)
    return None


def shown(name: str) -> str:
    """A model's name for the log: the last part of a path, or the name under which Hugging Face's cache keeps it."""
    if cached := CACHED.search(f"{name}/"):
        return cached[1]
    return os.path.basename(name.rstrip("/")) if os.path.isabs(name) or os.path.isdir(name) else name


def plain(name: str) -> str:
    """A model's name without organisation or folder, in lower case."""
    cached = CACHED.search(f"{name}/")
    return (cached[1] if cached else name.rstrip("/").rpartition("/")[2]).lower()
