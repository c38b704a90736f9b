# SPDX-License-Identifier: Apache-2.0
"""Servers that the tests share, because a start takes half a minute, and reading a prompt on a CPU some seconds."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest

from demo.server import SMALL_MODEL, STOP_TIMEOUT_S, Server, minference_option, running, stop
from tests.serving.client import Reply, complete, prefilled
from tests.serving.engine_jobs import Job, run
from tests.serving.features import Answer, answers, served
from tests.serving.forked import start_fork_server, start_serving
from tests.serving.prompts import COPIES
from tests.serving.server import MODEL, ON_GPU, arguments, serving

CHUNK = 512
# Several servers share the GPU. When vLLM measures free memory itself, it fails if another process frees some
# meanwhile, so the cache has a fixed size. Decode replays CUDA graphs; nothing is compiled, which would take minutes.
GPU_OPTIONS = [
    "--gpu-memory-utilization=0.15",
    "--kv-cache-memory-bytes=2000000000",
    "--no-enforce-eager",
    '--compilation-config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}',
]
OPTIONS = [f"--max-num-batched-tokens={CHUNK}", *(GPU_OPTIONS if ON_GPU else [])]
# Every chunk of a prompt of a thousand tokens passes the gate.
MIN_CHUNK = 32
LOW_GATE = {"min_seq_len": CHUNK, "min_chunk": MIN_CHUNK}
EVERY_KEY = {
    **LOW_GATE,
    "method": {"name": "vertical_slash", "vertical_size": 10_000, "slash_size": 10_000},
    "page_salt": "method",
}
STOCK = "FLASH_ATTN" if ON_GPU else "CPU_ATTN"
START_TIMEOUT_S = 300

RIVAL = """
def register():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, "rival.Backend")
"""


class FullBudget(NamedTuple):
    """What came of a server that keeps every key.

    Attributes:
        replies: to COPIES.
        sparse_tokens: of these prompts.
        reused_tokens: of a prompt that came twice.
        log: of the server.
    """

    replies: list[Reply]
    sparse_tokens: float
    reused_tokens: float
    log: str


class Start(NamedTuple):
    """What came of a `vllm serve` that must fail to start."""

    status: int | None
    log: str


@pytest.fixture(scope="session", autouse=True)
def small_machine() -> Iterator[None]:
    """One thread per server: several would wait for each other in every small operation, longer on busy cores."""
    with patch.dict(os.environ, {} if ON_GPU else {"OMP_NUM_THREADS": "1"}):
        yield


@pytest.fixture(scope="session", autouse=True)
def fork_server(small_machine: None) -> None:
    """Starts before the first test: tests start servers in several threads, each with a copy of the environment."""
    if not ON_GPU:
        start_fork_server()


@pytest.fixture(scope="session", autouse=True)
def stop_on_request() -> Iterator[None]:
    """A test run that gets SIGTERM stops its servers before it ends."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped by SIGTERM."))
    yield
    signal.signal(signal.SIGTERM, previous)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="session")
def sparse(logs: Path) -> Iterator[Server]:
    """Prompts go sparse in chunks of 1,024 tokens, by the default method."""
    with serving(logs / "sparse.log", *OPTIONS, **LOW_GATE) as server:
        yield server


@pytest.fixture(scope="session")
def rival(logs: Path) -> Path:
    """A folder for PYTHONPATH with an installed plugin that takes the CUSTOM backend for itself."""
    folder = logs / "rival"
    metadata = folder / "rival-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "rival.py").write_text(RIVAL)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: rival\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\nrival = rival:register\n")
    return folder


def full_budget(log: Path) -> FullBudget:
    reused = "vllm:prefix_cache_hits_total"
    options = [*SMALL_MODEL, *OPTIONS, *minference_option(**EVERY_KEY)]
    with running(str(MODEL), log, *options, start=start_serving) as server:
        replies = [complete(server, copy.prompt, "copies", 24) for copy in COPIES]
        before, short = server.metric(reused), list(range(1000, 1400))
        for _ in range(2):
            complete(server, short, "a user's", 1)
        counted, now = prefilled(server), server.metric(reused)
    return FullBudget(replies, counted.sparse, now - before, log.read_text())


def stock_answers(folder: Path) -> list[Answer]:
    """vLLM's own backend, in one process: a server would start three."""
    sampling = {"max_tokens": 24, "detokenize": True}
    steps = [{"do": "ask", "prompts": [{"prompt": copy.prompt}], "sampling": sampling} for copy in COPIES]
    job = Job(str(MODEL), STOCK, arguments(*SMALL_MODEL, *OPTIONS), steps)
    outcome = served(run({"stock": job}, folder, START_TIMEOUT_S)["stock"])
    return [answers(step)[0] for step in outcome.steps]


@pytest.fixture(scope="session")
def compared(logs: Path, rival: Path) -> tuple[FullBudget, list[Answer]]:
    """Replies to COPIES from the sparse path with every key kept, and from vLLM's backend; both beside a rival."""
    paths = os.pathsep.join(filter(None, [str(rival), os.environ.get("PYTHONPATH")]))
    with patch.dict(os.environ, {"PYTHONPATH": paths}), ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.submit(full_budget, logs / "full.log"), pool.submit(stock_answers, logs / "stock")
        return ours.result(), theirs.result()


def start(log: Path, options: list[str], environ: dict[str, str]) -> Start:
    process = start_serving(str(MODEL), log, "--port=0", *SMALL_MODEL, *OPTIONS, *options, **environ)
    try:
        status = process.wait(START_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        stop(process, STOP_TIMEOUT_S)
    return Start(status, log.read_text(errors="replace"))


@pytest.fixture(scope="session")
def refused(logs: Path) -> dict[str, Start]:
    """Starts with settings that nobody can serve, side by side; tests/unit has all that may be wrong with one."""
    broken = logs / "broken.json"
    broken.write_text(json.dumps({"min_chunk": 500})[:-1])
    with ThreadPoolExecutor(2) as pool:
        starts = {
            "unknown key": pool.submit(start, logs / "unknown.log", minference_option(min_seq_length=7), {}),
            "broken file": pool.submit(start, logs / "broken.log", [], {"MINFERENCE_CONFIG": str(broken)}),
        }
        return {name: future.result() for name, future in starts.items()}
