# SPDX-License-Identifier: Apache-2.0
"""What a worker process says of its settings."""

import logging

import pytest
import torch

from minference_vllm import runtime
from minference_vllm.config import MInferenceConfig


@pytest.mark.parametrize("publish", [True, False], ids=["rank 0", "another rank"])
def test_the_resolved_settings_are_logged_once_an_engine(publish: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(runtime.logger, "info", lambda text, *arguments: lines.append(text % arguments))
    config = MInferenceConfig(slash_size=777, log_every=0)
    runtime.Runtime(config, torch.device("cpu"), publish)
    assert [line for line in lines if "slash_size=777" in line and "min_seq_len=16384" in line] == lines[-1:] * publish
    assert logging.getLogger("vllm.minference") is runtime.logger
