# SPDX-License-Identifier: Apache-2.0
"""The one format of a result: where and with what it was measured, then rows of figures.

A result is a JSON object with the keys of `describe_run`, further keys of the benchmark, and `rows`, a list of flat
objects. If one of the keys cannot be found out, the benchmark stops: a figure of unknown origin is worthless.
"""

import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
COMMIT_VARIABLE = "MINFERENCE_COMMIT"
NO_GPU = "none (cpu)"
NEEDS_NONE = "none needed"
# A result that was just written does not change what is measured.
MEASURED = (".", ":(exclude)benchmarks/results")
ABSOLUTE_PATH = re.compile(r"""(?<![^\s=:,"'\[])/[^\s/:,"'\]][^\s:,"'\]]*""")
"""An absolute path at the start of an argument, or after a character that is no part of a path; not in a URL."""
OF_A_PART = ("command", "date", "rows")
"""Keys that differ between the parts of one result."""


class ResultError(RuntimeError):
    """Something about a run that must be on record cannot be found; the message says what, and what to do."""


def describe_run(without_gpu: bool = False, needs_gpu: bool = True) -> dict[str, str]:
    """Card, driver, versions, commit, command and date of this run. Call it first: it fails before time is spent.

    Args:
        without_gpu: whether this is a smoke test, whose figures mean nothing, so that a machine without a GPU will do.
        needs_gpu: False if no figure depends on a GPU; a card that happens to be there is then not noted.

    Raises:
        ResultError: one of them cannot be found out.
    """
    import torch
    import triton
    import vllm

    if not needs_gpu:
        gpu = driver = NEEDS_NONE
    elif without_gpu and not torch.cuda.is_available():
        gpu = driver = NO_GPU
    else:
        gpu, driver = _card()
    return {
        "gpu": gpu,
        "driver": driver,
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": _commit(),
        "command": _command(sys.orig_argv[1:]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write(
    path: Path, rows: list[dict[str, Any]], without_gpu: bool = False, needs_gpu: bool = True, **extra: Any
) -> None:
    """Write a result file.

    Args:
        path: the file; its folder is made.
        rows: the figures, flat.
        without_gpu, needs_gpu: see describe_run.
        extra: more keys, such as `settings`.
    """
    write_as(path, describe_run(without_gpu, needs_gpu), rows, **extra)


class Merged(NamedTuple):
    """Several parts put together; nothing is written yet.

    Attributes:
        run: all keys of a result except its rows.
        rows: of all parts.
    """

    run: dict[str, Any]
    rows: list[dict[str, Any]]

    def write(self, path: Path) -> list[dict[str, Any]]:
        """Write the parts as one result file, and return its rows."""
        write_as(path, self.run, self.rows)
        return self.rows


def merge(parts: Sequence[Path]) -> Merged:
    """Put several parts of one benchmark together, run on cards of one kind.

    Raises:
        ResultError: they cannot be read, or differ in more than rows, command, date and settings that only some of them
            have, such as those of an engine.
    """
    loaded = [read(part) for part in parts]
    shared = [{key: value for key, value in part.items() if key not in OF_A_PART} for part in loaded]
    whole = shared[0]
    for name, part in zip(parts, shared, strict=True):
        if differing := sorted(whole.keys() ^ part.keys()) or sorted(_join(whole, part)):
            raise ResultError(
                f"{name} is no part of the same run as {parts[0]}: they differ in {', '.join(differing)}."
            )
    run = {
        **whole,
        "command": "; ".join(part["command"] for part in loaded),
        "date": max(part["date"] for part in loaded),
    }
    return Merged(run, [row for part in loaded for row in part["rows"]])


def merge_or_exit(parts: Sequence[Path], names: Sequence[str] = ()) -> Merged:
    """As `merge`, for a command. The command writes the result once it has checked everything else.

    Args:
        names: of fields that tell rows apart, if there are any.

    Raises:
        SystemExit: they are no parts of one result, or two of them measured the same.
    """
    try:
        merged = merge(parts)
    except ResultError as error:
        raise SystemExit(str(error)) from None
    found = Counter(tuple(row[name] for name in names) for row in merged.rows)
    if names and (twice := [of for of, count in found.items() if count > 1]):
        raise SystemExit(f"{' '.join(map(str, parts))} hold {twice[0]} {found[twice[0]]} times: leave a part out")
    return merged


def _join(whole: dict[str, Any], part: dict[str, Any]) -> list[str]:
    """Add to the objects of the whole what only the part's have; return the names of entries in which both differ."""
    differing = []
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(whole.get(key), dict):
            differing += [f"{key}.{name}" for name in _join(whole[key], value)]
        elif whole.setdefault(key, value) != value:
            differing.append(key)
    return differing


def read(path: Path) -> dict[str, Any]:
    """What `write` has written.

    Raises:
        ResultError: it cannot be read, or is no result.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} is no result file: {error}.") from None
    if not isinstance(found, dict) or not found.keys() >= {*OF_A_PART}:
        raise ResultError(f"{path} is no result file: it needs to be an object with {', '.join(OF_A_PART)}.")
    return found


def write_as(path: Path, run: dict[str, str], rows: list[dict[str, Any]], **extra: Any) -> None:
    """Write a result file for an earlier run, as when several files are merged into one.

    Args:
        run: what describe_run returned then.
        path, rows, extra: see write.
    """
    if taken := extra.keys() & run.keys():
        raise ValueError(f"{sorted(taken)} describe the run: use other keys")
    if not rows:
        raise ValueError("a result without rows")
    for row in rows:
        if nested := [key for key, value in row.items() if isinstance(value, dict | list | tuple)]:
            raise ValueError(f"rows are flat, but {nested} of {row} are not")
    text = ",\n".join(f"{json.dumps(key)}: {_json(value)}" for key, value in {**run, **extra, "rows": rows}.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{{\n{text}\n}}\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as text in columns."""
    shown = [[_cell(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), *shown]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _json(value: Any) -> str:
    """JSON with one line for each item: long lists of figures stay short, and differences between results show."""
    if isinstance(value, dict):
        return "{\n  " + ",\n  ".join(f"{json.dumps(key)}: {_flat_json(item)}" for key, item in value.items()) + "\n}"
    if isinstance(value, list):
        return "[\n  " + ",\n  ".join(map(_flat_json, value)) + "\n]"
    return _flat_json(value)


def _flat_json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def _command(arguments: Sequence[str]) -> str:
    """The command without this machine's folders: of absolute paths, alone or in an argument, only the name is left."""
    short = []
    for argument in arguments:
        is_path = argument.startswith("/") and " /" not in argument  # it may hold what ends ABSOLUTE_PATH
        short.append(
            (Path(argument).name or argument)
            if is_path
            else ABSOLUTE_PATH.sub(lambda path: Path(path[0]).name, argument)
        )
    return shlex.join(["python", *short])


def _card() -> tuple[str, str]:
    """Name and driver version of the GPU that this process sees first."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible.split(',')[0]}")
    name, _, driver = _output(query).partition("\n")[0].partition(", ")
    if not (name and driver):
        raise ResultError(f"The GPU and its driver are unknown: `{shlex.join(query)}` names none.")
    return name, driver


def _commit() -> str:
    """The commit that is measured: from COMMIT_VARIABLE, else from git, with "+dirty" if the tree differs from it."""
    if commit := os.environ.get(COMMIT_VARIABLE, ""):
        return commit
    try:
        commit = _output(["git", "rev-parse", "--verify", "HEAD"])
        changes = _output(["git", "status", "--porcelain", "--", *MEASURED])
    except ResultError as error:
        raise ResultError(f"The commit is unknown: {error} Set {COMMIT_VARIABLE} in a copy without history.") from None
    return f"{commit}+dirty" if changes else commit


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except OSError as error:
        raise ResultError(f"`{shlex.join(command)}` does not run: {error.strerror}.") from None
    except subprocess.CalledProcessError as error:
        raise ResultError(f"`{shlex.join(command)}` failed: {error.stderr.strip()}.") from None
