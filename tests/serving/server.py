# SPDX-License-Identifier: Apache-2.0
"""The model and the server of the serving tests."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from demo.server import SMALL_MODEL, Server, minference_option, running

MODEL = Path(os.environ.get("MINFERENCE_TEST_MODEL", Path(__file__).parents[2] / "models/SmolLM2-135M-Instruct"))
ON_GPU = torch.cuda.is_available()
needs_model = pytest.mark.skipif(
    not MODEL.is_dir(), reason=f"no model in {MODEL}: `make test` fetches it, MINFERENCE_TEST_MODEL names another"
)


@contextmanager
def serving(log: Path, *options: str, **minference: object) -> Iterator[Server]:
    """A server of MODEL inside a `with` block.

    Args:
        log: file for its output.
        options: more `vllm serve` options.
        minference: settings of this package, for example min_seq_len=2048.
    """
    with running(str(MODEL), log, *SMALL_MODEL, *options, *minference_option(**minference)) as server:
        yield server


def arguments(*options: str) -> dict[str, Any]:
    """Options of `vllm serve` as vllm.LLM takes them."""
    found: dict[str, Any] = {}
    for option in options:
        name, is_given, value = option.removeprefix("--").partition("=")
        given: Any = value if is_given else not name.startswith("no-")
        with suppress(TypeError, json.JSONDecodeError):  # a name stays as it is
            given = json.loads(given)
        found[name.removeprefix("no-").replace("-", "_")] = given
    return found
