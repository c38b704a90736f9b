# SPDX-License-Identifier: Apache-2.0
"""The host's time for sparse layers, without launches."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.results import COMMIT_VARIABLE


def test_a_layer_that_repeats_takes_the_host_less_time(tmp_path: Path) -> None:
    """In a process of its own: Triton's interpreter, which the tests use, would run the kernels."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = tmp_path / "host.json"
    command = [sys.executable, "-m", "benchmarks.host", "--tiny", "--without-launches", "--out", str(out)]
    subprocess.run(command, env=environ | {COMMIT_VARIABLE: "abc"}, check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert found["gpu"] == "none needed" and found["settings"]["launches"] == "left out: Python alone"
    assert [row["layers"] for row in found["rows"]] == [24, 24]
    for row in found["rows"]:
        assert 0 < row["repeated_us"] < row["alone_us"]
