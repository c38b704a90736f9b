# SPDX-License-Identifier: Apache-2.0
"""Makes one result of several stretches of the same traffic, told apart by their seeds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import DENSE, SPARSE, results
from benchmarks.soak import limits
from benchmarks.soak.found import Found

STRETCH = "stretch"
ALL = "all"
OF_A_STRETCH = ("command", "date", "commit", "gpu", "driver", "vllm", "torch", "triton")
SAME = ("gpu", "driver", "vllm", "torch", "triton", "commit", "settings", "limits")


class MergeError(ValueError):
    """The stretches cannot be one result."""


def read(path: Path) -> dict[str, Found]:
    """What a stretch found, by backend.

    Raises:
        MergeError: it is no whole stretch.
    """
    record = json.loads(path.read_text())
    rows = [row for row in record["rows"] if row[STRETCH] != ALL]
    if sorted(row["backend"] for row in rows) != [DENSE, SPARSE]:
        raise MergeError(f"{path} must hold one dense and one sparse row, as a run leaves them; it holds {len(rows)}")
    return {row["backend"]: Found.from_row(row, record["details"][row["backend"]]) for row in rows}


def merge(paths: Sequence[Path], out: Path) -> list[str]:
    """Write one result of several, and return the limits that it exceeds.

    Errors, restarts and tokens are added, latencies pooled. Memory is judged within each stretch, sparse against dense;
    the merged rows hold the most that it may have grown in any of them. Prompts must have run sparse in each stretch.

    Raises:
        MergeError: they differ in what was measured or with what, or two have one seed.
    """
    records = [json.loads(path.read_text()) for path in paths]
    first = records[0]
    for path, record in zip(paths, records, strict=True):
        if differing := [key for key in SAME if record[key] != first[key]]:
            raise MergeError(
                f"{path} and {paths[0]} differ in {', '.join(differing)}: they are no stretches of one run"
            )
    if len({record["seed"] for record in records}) < len(records):
        raise MergeError("two stretches have the same seed, so the same requests: give each its own --seed")
    stretches = [read(path) for path in paths]
    pooled = {backend: sum((found[backend] for found in stretches), Found(backend)) for backend in (DENSE, SPARSE)}
    rows = [row for number, found in enumerate(stretches, 1) for row in make_rows(found, number)]
    watched = tuple(first["watched"])
    faults = limits.of_traffic(pooled)
    is_any_sparse = not limits.of_sparse_work(pooled)  # true even if only one stretch ran sparse
    for path, found in zip(paths, stretches, strict=True):
        of_one = limits.of_memory(found, watched) + limits.of_sparse_work(found) * is_any_sparse
        faults += [f"{path}: {fault}" for fault in of_one]
    run = {key: first[key] for key in OF_A_STRETCH}
    run |= {"command": " && ".join(record["command"] for record in records), "date": records[-1]["date"]}
    extra: dict[str, Any] = {key: first[key] for key in ("settings", "limits", "watched")}
    results.write_as(out, run, [*rows, *make_rows(pooled, ALL)], **extra, exceeded=faults, details=details(pooled))
    return faults


def make_rows(found: dict[str, Found], stretch: int | str) -> list[dict[str, Any]]:
    return [{STRETCH: stretch, **one.row()} for one in found.values()]


def details(found: dict[str, Found]) -> dict[str, Any]:
    return {backend: one.details() for backend, one in found.items()}
