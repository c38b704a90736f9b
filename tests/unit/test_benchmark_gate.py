# SPDX-License-Identifier: Apache-2.0
"""What benchmarks.gate writes of the times that tune measures."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gate, results
from minference_vllm.tuning.gate import Timing
from tests.conftest import import_or_skip

import_or_skip("vllm")

METHOD = ("--method", "1000:6096")


def test_the_record_holds_every_length_and_the_gate_of_each_chunk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measure(heads: Any, config: Any, device: Any, lengths: list[int], chunk: int, *_: Any) -> Iterator[Timing]:
        assert tuple(heads) == (32, 8, 128)
        assert (config.method.name, config.method.vertical_size) == ("vertical_slash", 1000)
        yield from (Timing(tokens, tokens / chunk, 2.0) for tokens in lengths)

    out = tmp_path / "gate.json"
    monkeypatch.setattr(gate.timing, "measure", measure)
    monkeypatch.setattr(results, "_card", lambda: ("a card", "a driver"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        sys, "argv", ["gate", "--chunks", "4", "8", "--lengths", "16", "4", "8", "--out", str(out), *METHOD]
    )
    gate.main()
    record = json.loads(out.read_text())
    assert record["min_seq_len"] == {"chunks of 4": 16, "chunks of 8": None}
    assert [(row["chunk"], row["tokens"], row["speedup"]) for row in record["rows"]] == [
        (4, 4, 0.5), (4, 8, 1.0), (4, 16, 2.0), (8, 4, 0.25), (8, 8, 0.5), (8, 16, 1.0),
    ]  # fmt: skip
