# SPDX-License-Identifier: Apache-2.0
"""What several unit tests look at."""

import logging

import pytest

from minference_vllm.metrics import counters as counters_module


@pytest.fixture
def log_lines(monkeypatch):
    """What the metrics logger says, whether or not vLLM has configured its parent."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    counters_module.logger.addHandler(handler)
    monkeypatch.setattr(counters_module.logger, "level", logging.INFO)
    yield lines
    counters_module.logger.removeHandler(handler)
