# SPDX-License-Identifier: Apache-2.0
"""What the layers of a worker process share: settings, scratch, counts."""

import logging
from dataclasses import replace

import pytest
import torch

from minference_vllm import runtime
from minference_vllm.config import MInferenceConfig
from minference_vllm.index import PagedKV
from minference_vllm.plan import SparseChunk
from minference_vllm.workspace import Geometry

GEOMETRY = Geometry(num_qo_heads=2, max_seq_len=512, max_chunk=256, num_probes=64, max_columns=1000)


@pytest.mark.parametrize("publish", [True, False], ids=["rank 0", "another rank"])
def test_the_resolved_settings_are_logged_once_an_engine(publish: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(runtime.logger, "info", lambda text, *arguments: lines.append(text % arguments))
    config = MInferenceConfig(slash_size=777, log_every=0)
    runtime.Runtime(config, torch.device("cpu"), publish)
    assert [line for line in lines if "slash_size=777" in line and "min_seq_len=16384" in line] == lines[-1:] * publish
    assert logging.getLogger("vllm.minference") is runtime.logger


def test_nothing_is_claimed_on_the_device_before_the_scratch() -> None:
    # Layers are built in a memory pool that vLLM's sleep mode drops with the weights.
    worker = runtime.Runtime(MInferenceConfig(log_every=0), torch.device("cpu"), publish=False)
    assert not any(isinstance(value, torch.Tensor) for value in vars(worker).values())
    assert worker._density is None
    with torch.inference_mode():  # as in vLLM's profiling run
        worker.workspace(GEOMETRY)
    kept = worker.workspace(GEOMETRY).kept_pairs
    kept += 7
    worker._density.copy(causal_pairs_so_far=9)
    assert worker.read_density() == (7, 9)


def test_a_dry_run_is_not_counted() -> None:
    worker = runtime.Runtime(MInferenceConfig(log_every=0), torch.device("cpu"), publish=False)
    kept = worker.workspace(GEOMETRY).kept_pairs
    kept += 12
    worker.dry_run(1, 64, 16, torch.bfloat16, replace(GEOMETRY, max_seq_len=768))
    assert kept.item() == 12
    assert worker._causal_pairs == 0


@pytest.mark.parametrize("publish", [True, False], ids=["rank 0", "another rank"])
def test_what_ran_sparse_is_published_once_it_has_been_copied(publish: bool) -> None:
    worker = runtime.Runtime(MInferenceConfig(log_every=0), torch.device("cpu"), publish)
    worker.copy_density()  # before any scratch
    assert worker.counters.snapshot().density is None
    keys = torch.zeros(32, 1, 16, 64, dtype=torch.bfloat16)
    kv = PagedKV(keys, keys, torch.arange(32, dtype=torch.int32)[None], 0)
    q = torch.zeros(200, GEOMETRY.num_qo_heads, 64, dtype=torch.bfloat16)
    chunk = SparseChunk(request=0, query_start=0, num_rows=200, context_len=0)
    worker.run(q, kv, chunk, 1.0, GEOMETRY, torch.empty_like(q))
    assert worker.counters.snapshot().density is None
    worker.copy_density()
    counted = worker.counters.snapshot()
    assert counted.causal_pairs == (2 * 200 * 201 // 2 if publish else 0)
    assert (0 < counted.kept_pairs <= counted.causal_pairs) == publish
