# SPDX-License-Identifier: Apache-2.0
"""A search of a tiny model in vLLM's real engine for the CPU, and the file that it found, served."""

import json
from pathlib import Path
from typing import Any

import pytest

from demo.server import environment, excerpt
from tests.serving import searching
from tests.serving.forked import run_program
from tests.serving.searching import LENGTHS
from tests.serving.server import ON_GPU
from tests.serving.tiny_makers import GLOBAL_LAYER

pytestmark = [pytest.mark.serving, pytest.mark.skipif(ON_GPU, reason="counts what the CPU backend attends to")]

TIMEOUT_S = 560


@pytest.fixture(scope="module")
def searched(logs: Path) -> dict[str, Any]:
    """What came of the search, see searching.py."""
    folder, log = logs / "search", logs / "search.log"
    folder.mkdir()
    environ = {**environment(str(folder)), "TORCHDYNAMO_DISABLE": "1"}
    assert run_program(searching.__name__, folder, log, environ, TIMEOUT_S) == 0, excerpt(log)
    found: dict[str, Any] = json.loads((folder / "searched.json").read_text())
    return found


def test_the_layer_that_may_run_sparse_is_searched_and_the_others_are_dense(searched: dict[str, Any]) -> None:
    others = [layer for index, layer in enumerate(searched["layers"]) if index != GLOBAL_LAYER]
    assert others == ["dense"] * 5
    assert searched["layers"][GLOBAL_LAYER] in (2, "dense")  # heads


def test_what_is_read_with_all_keys_is_what_is_compared_with(searched: dict[str, Any]) -> None:
    assert searched["noise"] == pytest.approx(0.0, abs=1e-7)
    verdict = searched["verdict"]
    assert len(verdict["file_kl"]) == len(verdict["default_kl"]) == 2
    assert min(*verdict["file_kl"], *verdict["default_kl"]) >= -1e-7
    assert verdict["file_cost"] <= 1.02 * verdict["default_cost"]


def test_all_that_was_announced_was_done(searched: dict[str, Any]) -> None:
    # Of each of two prompts: all candidates, and the one layer. Then two fits, and two checks.
    assert searched["said"] == searched["steps"] == 2 * (1 + 1) + 2 + 2


def test_the_file_is_served(searched: dict[str, Any]) -> None:
    assert "of the pattern file" in searched["why"]
    assert searched["sparse"] == (0 if searched["layers"][GLOBAL_LAYER] == "dense" else LENGTHS[0])
