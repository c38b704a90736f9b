# SPDX-License-Identifier: Apache-2.0
"""What several unit tests look at."""

import logging

import pytest


@pytest.fixture
def log_lines(monkeypatch):
    """What the metrics logger says, whether or not vLLM has configured its parent."""
    lines = []
    logger = logging.getLogger("vllm.minference.metrics")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "level", logging.INFO)
    yield lines
    logger.removeHandler(handler)
