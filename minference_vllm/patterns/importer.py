# SPDX-License-Identifier: Apache-2.0
"""Makes pattern files from MInference's lists of patterns.

A list has one object for each layer, which maps a head's number to [pattern, columns, diagonals, score]. Such lists are
written by MInference's search and come with MInference. Checkpoints of Qwen with a context of a million tokens hold one
too: in sparse_attention_config.json, or in config.json under dual_chunk_attention_config.
"""

import json
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from minference_vllm.errors import ConfigError, shortened
from minference_vllm.files import parse_json
from minference_vllm.patterns.file import Geometry, PatternFile, Provenance, parse_pattern
from minference_vllm.patterns.shared import A_SHAPE

VERTICAL_SLASH, STREAMING, BLOCK_SPARSE = "vertical_and_slash", "stream_llm", "block_sparse"

USUAL = (1000, 6096)
"""Columns and diagonals of a head that a list leaves out (minference_forward.py of minference 0.1.6.0), and of a head
that a list calls block_sparse, as MInference's search would have written it."""

LEAST = (30, 50)
"""MInference keeps at least this many columns and diagonals, whatever its list says."""

Counts = Counter[str]


def import_list(
    content: bytes, name: str, geometry: Geometry, models: Sequence[str], source: Provenance
) -> PatternFile:
    """The pattern file of a list.

    Args:
        content: JSON: the list, or the config.json of a model that contains one.
        name: how messages name it.
        geometry: the model's; a list does not hold all of it.
        models: names that the method "auto" is to use the file for.
        source: where the list is from; its sha256 and notes are added.

    Raises:
        ConfigError: the content is no such list, or the list of a different model.
    """
    layers, mapped = find_list(content, name), Counter[str]()
    if len(layers) != geometry.num_layers:
        raise ConfigError(
            f"{name} has {len(layers)} layers, and the model {geometry.num_layers}: give its config.json."
        )
    heads = [_heads(layer, f"{name}, layer {at}", geometry, mapped) for at, layer in enumerate(layers)]
    _refuse_fewer_heads(layers, name, geometry)
    provenance = source.model_copy(
        update={"sha256": sha256(content).hexdigest(), "notes": (*source.notes, *_notes(mapped))}
    )
    file = {
        "version": 1,
        "models": list(models),
        "geometry": geometry.model_dump(),
        "provenance": provenance.model_dump(),
        "layers": heads,
    }
    return parse_pattern(json.dumps(file), name)


def find_list(content: bytes, name: str) -> list[Any]:
    """The list in a file: alone, or in a model's config.json.

    Raises:
        ConfigError: there is none.
    """
    found = parse_json(content, name)
    if isinstance(found, dict):
        dual_chunk = found.get("dual_chunk_attention_config")
        found = dual_chunk.get("sparse_attention_config") if isinstance(dual_chunk, dict) else None
    if not isinstance(found, list):
        raise ConfigError(
            f"{name} holds no list of patterns: it must be a list of layers, or an object with one under "
            "dual_chunk_attention_config.sparse_attention_config."
        )
    return found


def write(file: PatternFile) -> str:
    """The text of a pattern file, with one line for each layer."""
    content = file.model_dump(mode="json")
    layers = ",\n".join(f"    {json.dumps(layer, separators=(',', ':'))}" for layer in content.pop("layers"))
    head = json.dumps(content, indent=2).removesuffix("\n}")
    return f'{head},\n  "layers": [\n{layers}\n  ]\n}}\n'


def _heads(layer: Any, where: str, geometry: Geometry, mapped: Counts) -> list[list[Any]]:
    """What the heads of a layer keep."""
    if not isinstance(layer, dict):
        raise ConfigError(f"{where} is {shortened(layer)}: it must be an object from a head's number to its pattern.")
    wanted = [str(head) for head in range(geometry.num_qo_heads)]
    if unknown := layer.keys() - set(wanted):
        given = shortened(min(unknown), str)
        raise ConfigError(f"{where} has a head {given}, and the model's heads are 0 to {geometry.num_qo_heads - 1}.")
    return [_head(layer.get(head), f"{where}, head {head}", mapped) for head in wanted]


def _refuse_fewer_heads(layers: Sequence[dict[str, Any]], name: str, geometry: Geometry) -> None:
    """Refuse a list of a model with fewer heads: a list may leave heads out, but some layer names the last head."""
    highest, last = max((int(head) for layer in layers for head in layer), default=None), geometry.num_qo_heads - 1
    if highest != last:
        names = "no heads" if highest is None else f"heads up to {highest}"
        raise ConfigError(
            f"{name} names {names}, and the model's are 0 to {last}: it is another model's. Give the config.json of "
            "the model that it was made for."
        )


def _head(entry: Any, where: str, mapped: Counts) -> list[Any]:
    if entry is None:
        mapped["{} heads that the list leaves out keep {} / {}, as in MInference"] += 1
        return [*USUAL]
    if not isinstance(entry, list) or len(entry) < 3 or not all(type(size) is int for size in entry[1:3]):
        raise ConfigError(f"{where} is {shortened(entry)}: it must be [pattern, columns, diagonals, score].")
    pattern, columns, diagonals = entry[:3]
    if pattern == VERTICAL_SLASH:
        kept = max(columns, LEAST[0]), max(diagonals, LEAST[1])
        if kept != (columns, diagonals):
            mapped[f"{{}} heads keep at least {LEAST[0]} / {LEAST[1]}, as in MInference"] += 1
        return [*kept]
    if pattern == STREAMING:
        mapped["{} heads of stream_llm are a_shape: the first keys and the nearest, nothing else"] += 1
        return [A_SHAPE, columns, diagonals]
    if pattern == BLOCK_SPARSE:
        mapped["{} heads of block_sparse keep {} / {}, as MInference's search would have written them"] += 1
        return [*USUAL]
    known = f"{VERTICAL_SLASH}, {STREAMING} and {BLOCK_SPARSE}"
    raise ConfigError(f"{where} has the pattern {shortened(pattern)}: only {known} can be imported.")


def _notes(mapped: Counts) -> list[str]:
    return [note.format(count, *USUAL) for note, count in mapped.items()]
