# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm eval` as the tests run it, and what it wrote."""

import json
from pathlib import Path
from typing import Any

from minference_vllm import cli
from minference_vllm.evals import prepare
from minference_vllm.evals.sample import Sample
from tests.unit.evals.fake_openai import MODEL, FakeServer

SAMPLES = 6  # of each task
SENTENCE = "Sentence {} says little. "


def samples(folder: Path) -> list[Sample]:
    return prepare.load(folder).samples


def run(dense: FakeServer, sparse: FakeServer, prepared: Path, out: Path, *more: str) -> int:
    servers = ["--dense", dense.url, "--sparse", f"{sparse.url}/v1/", "--model", MODEL]
    return cli.main(["eval", *servers, "--prepared", str(prepared), "--out", str(out), *more])


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["task"]: row for row in report(out)["rows"]}
