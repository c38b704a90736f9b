# SPDX-License-Identifier: Apache-2.0
"""The model and the server of the serving tests."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from demo.server import SMALL_MODEL, Server, minference_option, running

MODEL = Path(os.environ.get("MINFERENCE_TEST_MODEL", Path(__file__).parents[2] / "models/SmolLM2-135M-Instruct"))
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
