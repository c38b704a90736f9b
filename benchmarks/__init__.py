# SPDX-License-Identifier: Apache-2.0
"""Benchmarks against vLLM's own attention, every engine in a process of its own."""

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

DENSE, SPARSE = "dense", "sparse"
DENSE_BACKEND, SPARSE_BACKEND = "FLASH_ATTN", "MINFERENCE"


def argument_parser(description: str | None, tiny: str, compares: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has; `tiny` says what the benchmark's smoke test runs.

    Args:
        compares: whether the benchmark also runs an engine with vLLM's own attention.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the result file")
    if compares:
        parser.add_argument("--dense-backend", default=DENSE_BACKEND, help="what to compare with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help=f"smoke test, runs without a GPU: {tiny}")
    return parser


def load_engine(kind: str, spec: dict[str, Any]) -> Any:
    """vLLM in this process.

    Args:
        kind: SPARSE gives the plugin with the settings spec["minference"], anything else spec["dense_backend"].
        spec: holds the other arguments of `vllm.LLM` as spec["engine"].
    """
    from vllm import LLM

    from minference_vllm import plugin

    if kind == SPARSE:
        plugin.register()  # vLLM does this only if the package is installed, not if it is merely on the path
        settings = {"minference": spec["minference"]}
        llm = LLM(**spec["engine"], attention_backend=SPARSE_BACKEND, additional_config=settings)
        if runtime().is_broken:
            raise SystemExit("Sparse attention cannot run in this engine, as the log above says: nothing is measured.")
        return llm
    return LLM(**spec["engine"], attention_backend=spec["dense_backend"])


def runtime() -> Any:
    """The plugin's Runtime of the one engine in this process."""
    from minference_vllm.impl import _runtimes

    [only] = _runtimes.values()
    return only


def vertical_slash(vertical_size: int, slash_size: int) -> dict[str, Any]:
    """The setting `method` that keeps so many columns and diagonals."""
    return {"name": "vertical_slash", "vertical_size": vertical_size, "slash_size": slash_size}


def parse_method(text: str) -> dict[str, Any]:
    """The setting `method` from a name, `block`, a name and settings, `block:{"share": 0.95}`, or the sizes of
    vertical_slash, `1000:6096`."""
    name, _, rest = text.partition(":")
    if name.isdecimal():
        return vertical_slash(int(name), int(rest))
    return {"name": name, **json.loads(rest or "{}")}


def parse_settings(text: str) -> dict[str, Any]:
    """Settings of the plugin, from an object in JSON or from what parse_method takes."""
    if text.startswith("{"):
        settings: dict[str, Any] = json.loads(text)
        return settings
    return {"method": parse_method(text)}


class SparseWork(NamedTuple):
    """What ran sparse since the engine started, or between two readings.

    Attributes:
        measured_heads: heads of chunks whose recall was measured, in all layers.
        redone_heads: those of them that the guard had attend to all keys.
        recalls: sum over the measured heads.
    """

    sparse_tokens: int
    kept_pairs: int
    causal_pairs: int
    measured_heads: int
    redone_heads: int
    recalls: float

    @property
    def recall(self) -> float | None:
        """Mean over layers, heads and chunks, before the guard acted."""
        return self.recalls / self.measured_heads if self.measured_heads else None

    @property
    def redone(self) -> float | None:
        """Share of heads of chunks that the guard had attend to all keys."""
        return self.redone_heads / self.measured_heads if self.measured_heads else None

    @property
    def density(self) -> float | None:
        return self.kept_pairs / self.causal_pairs if self.causal_pairs else None

    def since(self, before: "SparseWork") -> "SparseWork":
        return SparseWork(*(now - then for now, then in zip(self, before, strict=True)))


def sparse_work() -> SparseWork:
    """What the plugin in this process has counted for all requests that have been answered."""
    total = runtime().counters.snapshot()
    sparse = sum(tokens for (path, _), tokens in total.tokens.items() if path == SPARSE)
    recall = total.recall
    recalls = sum(sum(layer.totals) for layer in recall.layers.values())
    return SparseWork(sparse, total.kept_pairs, total.causal_pairs, recall.measured, recall.redone, recalls)


def resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """All settings of the plugin, the defaults included, for the record."""
    from minference_vllm.config import MInferenceConfig

    return MInferenceConfig.model_validate(settings).model_dump()
