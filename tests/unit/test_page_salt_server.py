# SPDX-License-Identifier: Apache-2.0
"""Salted block hashes in a real server, whose engine core runs in a process of its own."""

from pathlib import Path

import pytest

from minference_vllm.config import load_config
from minference_vllm.patterns import resolve
from minference_vllm.salt import salt_of
from tests.serving.client import complete
from tests.serving.conftest import OPTIONS
from tests.serving.server import needs_model, serving

pytestmark = [pytest.mark.serving, needs_model]


def test_a_server_salts_its_pages_and_reuses_them(tmp_path: Path) -> None:
    log, settings = tmp_path / "log", {"page_salt": "method", "min_seq_len": 2048}
    with serving(log, *OPTIONS, **settings) as server:
        for _ in range(2):
            complete(server, list(range(1000, 1400)), "a user's", 1)
        assert server.metric("vllm:prefix_cache_hits_total") > 0
    config = load_config({"minference": settings}, {})
    salt = salt_of(config, resolve(config.method, None))
    assert f"MInference: block hashes are salted with {salt[:16]}: " in log.read_text()
