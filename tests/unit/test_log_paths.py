# SPDX-License-Identifier: Apache-2.0
"""What a running server logs names files, and no folders: logs go further than the machine that they are of."""

import json
from pathlib import Path

import pytest
import torch

from minference_vllm.budget import Budget
from minference_vllm.config import load_config
from minference_vllm.errors import ConfigError
from minference_vllm.metrics.publisher import METRICS_DIR
from minference_vllm.patterns import Geometry, ServedModel, resolve
from minference_vllm.record import StepRecord
from minference_vllm.runtime import Runtime
from tests.unit.test_patterns import GEOMETRY, content

FOLDER = "a customer's folder"
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / FOLDER
    made.mkdir()
    return made


def serve(folder: Path, model: str, **method: str) -> Runtime:
    """A worker of a server whose model and files are in the folder."""
    config = load_config({"minference": {"method": {"name": "auto", **method}, "min_chunk": 5000}}, {})
    runtime = Runtime(config, CPU, True, ServedModel((str(folder / model), model), Geometry(**GEOMETRY)))
    runtime.start(32_767, Budget(4096, 4096), has_sparse_layers=True)
    return runtime


def test_a_pattern_file_is_named_without_its_folder(folder: Path, log_lines: list[tuple[str, str]]) -> None:
    path = folder / "heads.json"
    path.write_text(json.dumps(content()))
    serve(folder, "model", pattern_file=str(path))
    assert len([line for _, line in log_lines if "heads.json" in line]) == 2, "the settings, and what they come to"
    assert [line for _, line in log_lines if FOLDER in line] == []


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("model", "model or its-alias"),
        ("model/", "model or its-alias"),
        ("hub/models--org--model/snapshots/0123abc", "model or its-alias"),
    ],
)
def test_a_model_in_a_folder_is_named_by_its_last_part(given: str, shown: str, folder: Path) -> None:
    (folder / given).mkdir(parents=True)
    model = ServedModel((f"{folder}/{given}", "its-alias"), Geometry(**GEOMETRY))
    assert resolve(load_config({"minference": {"method": "auto"}}, {}).method, model).why.startswith(
        f"no pattern file for {shown}: "
    )


def test_a_model_of_the_hub_keeps_its_organisation() -> None:
    model = ServedModel(("org/model",), Geometry(**GEOMETRY))
    assert "for org/model:" in resolve(load_config({"minference": {"method": "auto"}}, {}).method, model).why


def test_counts_that_cannot_be_written_are_warned_of_by_why(
    folder: Path, log_lines: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setenv(METRICS_DIR, str(folder / "gone"))
    runtime = serve(folder, "model")
    runtime.counters.defer(StepRecord("a group", [0, 5], [5], [True]))
    runtime.counters.flush()
    [line] = [line for _, line in log_lines if "cannot be written" in line]
    assert line.startswith("MInference metrics cannot be written: No such file or directory.")
    assert [line for _, line in log_lines if FOLDER in line] == []


def test_a_start_that_fails_names_the_file_as_it_was_given(folder: Path) -> None:
    path = folder / "heads.json"
    with pytest.raises(ConfigError, match=FOLDER):
        serve(folder, "model", pattern_file=str(path))
    path.write_text(json.dumps(content(geometry={**GEOMETRY, "num_layers": 3})))
    with pytest.raises(ConfigError, match=FOLDER):
        serve(folder, "model", pattern_file=str(path))
    with pytest.raises(ConfigError, match=FOLDER):
        load_config(None, {"MINFERENCE_CONFIG": str(folder / "none.json")})
