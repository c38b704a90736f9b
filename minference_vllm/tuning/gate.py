# SPDX-License-Identifier: Apache-2.0
"""From times to the gate: the length from which sparse prefill wins, and the file that says so."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from minference_vllm.errors import ConfigError
from minference_vllm.files import parse_json, read_file, write_file

MIN_SPEEDUP = 1.02
"""A smaller speed-up is taken for noise."""


class Timing(NamedTuple):
    """One layer's attention for the last chunk of a prompt of so many tokens."""

    tokens: int
    dense_ms: float
    sparse_ms: float

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.sparse_ms


def crossover(timings: Iterable[Timing]) -> int | None:
    """The smallest length from which sparse wins at every length measured; None if it loses at the longest."""
    gate = None
    for timing in sorted(timings, reverse=True):
        if timing.speedup < MIN_SPEEDUP:
            break
        gate = timing.tokens
    return gate


def write_gate(path: Path, min_seq_len: int) -> None:
    """Set min_seq_len in a file of settings, and leave its other settings as they are.

    Raises:
        ConfigError: the file cannot be read or written, or it is no longer valid: it may have changed while measuring.
    """
    name = str(path)
    settings = parse_json(read_file(path, name), name) if os.path.lexists(path) else {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{name} holds {type(settings).__name__}: it must hold a JSON object.")
    write_file(path, json.dumps({**settings, "min_seq_len": min_seq_len}, indent=2) + "\n", name)
