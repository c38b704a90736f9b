# SPDX-License-Identifier: Apache-2.0
"""What benchmarks.faults measured in parts, on several cards, is put together again."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import SPARSE, results
from benchmarks.faults import __main__ as faults
from benchmarks.faults.cases import CASES


def part(path: Path, names: list[str], **changes: Any) -> Path:
    rows = [{"case": name, "backend": SPARSE, "broken": ""} for name in names]
    path.write_text(json.dumps({"gpu": "a card", "command": path.stem, "date": "2026", "rows": rows, **changes}))
    return path


def test_parts_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, out = list(CASES), tmp_path / "out.json"

    def merge(*parts: Path) -> int:
        monkeypatch.setattr(sys, "argv", ["faults", "--merge", *map(str, parts), "--out", str(out)])
        return faults.main()

    one, two = part(tmp_path / "one", names[:4]), part(tmp_path / "two", names[4:])
    assert merge(one, two) == 0
    whole = json.loads(out.read_text())
    assert [row["case"] for row in whole["rows"]] == names and whole["command"] == "one; two"
    with pytest.raises(SystemExit, match="must hold each case once"):
        merge(one)
    with pytest.raises(SystemExit, match="differ in gpu"):
        merge(one, part(tmp_path / "other", names[4:], gpu="another"))
    assert json.loads(out.read_text()) == whole  # a refused merge writes nothing
    broken_row = {"case": names[-1], "backend": SPARSE, "broken": "it ended"}
    whole["rows"][-1] = broken_row
    assert merge(part(tmp_path / "bad", [], rows=whole["rows"])) == 1


def test_of_a_machine_without_a_gpu_cases_that_need_one_are_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name, case in CASES.items() if not case.needs_gpu]
    assert len(names) < len(CASES)

    def merge(**changes: Any) -> int:
        one, two = (part(tmp_path / f"part {at}", some, **changes) for at, some in enumerate((names[:4], names[4:])))
        monkeypatch.setattr(sys, "argv", ["faults", "--merge", str(one), str(two), "--out", str(tmp_path / "out")])
        return faults.main()

    assert merge(gpu=results.NO_GPU) == 0
    with pytest.raises(SystemExit, match="must hold each case once"):
        merge()
