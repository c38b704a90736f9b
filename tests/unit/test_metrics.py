# SPDX-License-Identifier: Apache-2.0
"""Counting, publishing and scraping, in one process and across the process trees that vLLM builds."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import prometheus_client
import pytest

from minference_vllm.metrics import counters as counters_module
from minference_vllm.metrics import exporter
from minference_vllm.metrics.counters import METRICS_DIR, MULTIPROC_DIR, Counters, Snapshot

SPARSE_TOKENS = 'minference_prefill_tokens_total{path="sparse",reason="gate_open"}'


@pytest.fixture(autouse=True)
def new_process(tmp_path, monkeypatch):
    """Forget what was installed, as a process does that starts with MINFERENCE_METRICS_DIR=directory."""

    def start(directory: str = "") -> None:
        monkeypatch.setenv(METRICS_DIR, directory)
        monkeypatch.delenv(MULTIPROC_DIR, raising=False)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setattr(prometheus_client, "REGISTRY", prometheus_client.CollectorRegistry(auto_describe=True))
        exporter.install.cache_clear()

    start()
    return start


def scrape() -> str:
    return prometheus_client.generate_latest(prometheus_client.REGISTRY).decode()


class Worker:
    """Counters, and what the GPU has told."""

    def __init__(self, publish: bool = True, log_every: float = 0) -> None:
        self.pairs = 0, 0
        self.counters = Counters(publish, log_every, tally=dict, read_pairs=lambda: self.pairs)

    def count(self, tokens: int) -> None:
        """One step: a sparse chunk of `tokens` tokens and two short dense ones; a quarter of the pairs kept."""
        self.counters.defer(({("sparse", "gate_open"): (tokens, 1), ("dense", "short_chunk"): (12, 2)},))
        self.pairs = tokens, 4 * tokens


def serve_one_step(tokens: int) -> None:
    """A worker process."""
    exporter.install()
    worker = Worker()
    worker.count(tokens)
    worker.counters.flush()


def run_engine_core(tokens: int) -> None:
    """An engine process, which starts a worker process."""
    exporter.install()
    run_process(serve_one_step, tokens)


def run_process(target, *args) -> None:
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0


def run_script(script: str, *arguments: str, **environment: str) -> str:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_thread_publishes_a_change_once(tmp_path, monkeypatch):
    monkeypatch.setattr(counters_module, "PUBLISH_SECONDS", 0.01)
    monkeypatch.setenv(METRICS_DIR, str(tmp_path))
    file = tmp_path / f"{os.getpid()}.json"
    worker = Worker()
    worker.counters.start()
    worker.count(100)
    wait_until(lambda: file.exists() and Snapshot.from_json(file.read_text()) == worker.counters.snapshot())
    file.unlink()
    time.sleep(0.1)
    assert not list(tmp_path.iterdir())


def test_log_lines_hold_each_token_once_and_idle_time_logs_nothing(monkeypatch, log_lines):
    monkeypatch.setattr(counters_module, "PUBLISH_SECONDS", 0.01)
    counters = Worker(log_every=0.02).counters
    counters.start()
    counters.defer(({("sparse", "gate_open"): (1000, 1)},))
    wait_until(lambda: len(log_lines) == 1)
    counters.defer(({("sparse", "gate_open"): (234, 1)},))
    wait_until(lambda: len(log_lines) == 2)
    time.sleep(0.1)
    assert [line.split(" prompt tokens")[0] for _, line in log_lines] == ["MInference: 1,000", "MInference: 234"]


def test_other_ranks_export_and_log_nothing(tmp_path, monkeypatch, log_lines):
    monkeypatch.setattr(counters_module, "PUBLISH_SECONDS", 0.01)
    monkeypatch.setenv(METRICS_DIR, str(tmp_path))
    worker = Worker(publish=False, log_every=0.01)
    worker.counters.start()
    worker.count(100)
    worker.counters.flush()
    time.sleep(0.1)
    assert worker.counters.snapshot().tokens["sparse", "gate_open"] == 100
    assert not list(tmp_path.iterdir())
    assert not log_lines


def test_an_unwritable_directory_costs_one_warning(tmp_path, monkeypatch, log_lines):
    (tmp_path / "file").touch()
    monkeypatch.setenv(METRICS_DIR, str(tmp_path / "file"))
    worker = Worker()
    for _ in range(3):
        worker.count(100)
        worker.counters.flush()
    assert [level for level, _ in log_lines] == ["WARNING"]
    assert worker.counters.snapshot().tokens["sparse", "gate_open"] == 300


def test_a_scrape_before_the_first_read_back_has_no_density():
    exporter.install()
    assert "\nminference_density " not in scrape()
    assert "minference_kept_pairs_total 0.0" in scrape()


def test_two_workers_sum_in_one_scrape():
    exporter.install()
    for name, tokens in (("1", 100), ("2", 300)):
        worker = Worker()
        worker.count(tokens)
        Path(os.environ[METRICS_DIR], f"{name}.json").write_text(worker.counters.snapshot().to_json())
    text = scrape()
    assert f"{SPARSE_TOKENS} 400.0" in text
    assert 'minference_prefill_tokens_total{path="dense",reason="short_chunk"} 24.0' in text
    assert 'minference_prefill_chunks_total{path="dense",reason="short_chunk"} 4.0' in text
    assert "minference_kept_pairs_total 400.0" in text
    assert "minference_causal_pairs_total 1600.0" in text
    assert "minference_density 0.25" in text


def test_installing_twice_changes_nothing():
    exporter.install()
    directory = os.environ[METRICS_DIR]
    exporter.install()
    assert os.environ[METRICS_DIR] == directory
    assert scrape().count("# TYPE minference_density gauge") == 1


def test_a_spawned_engines_worker_shows_in_the_servers_scrape():
    exporter.install()
    run_process(run_engine_core, 100)
    assert f"{SPARSE_TOKENS} 100.0" in scrape()


def test_runs_that_share_a_users_directory_are_counted_apart(tmp_path, new_process):
    for tokens in (100, 300):
        new_process(str(tmp_path / "made" / "if missing"))
        exporter.install()
        run_process(serve_one_step, tokens)
        assert f"{SPARSE_TOKENS} {tokens}.0" in scrape()


FORKING_SERVER = """
import os, sys
from minference_vllm.metrics.exporter import install
install()
child = os.fork()
if child == 0:
    install()
    sys.exit()
os.waitpid(child, 0)
print(os.path.isdir(os.environ["MINFERENCE_METRICS_DIR"]))
"""


def test_the_directory_outlives_forked_children_and_goes_with_its_owner(tmp_path):
    assert run_script(FORKING_SERVER, TMPDIR=str(tmp_path)) == "True\n"
    assert not list(tmp_path.iterdir())


FORKING_WORKER = """
import os, sys
from minference_vllm.metrics.counters import Counters
counters = Counters(publish=True, log_every=0, tally=dict, read_pairs=lambda: (0, 0))
counters.start()
counters.defer(({("sparse", "gate_open"): (5, 1)},))
if child := os.fork():
    os.waitpid(child, 0)
sys.exit()
"""


def test_a_forked_child_does_not_publish_its_parents_counts(tmp_path):
    run_script(FORKING_WORKER, MINFERENCE_METRICS_DIR=str(tmp_path))
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["prefill"][0]["tokens"] == 5


SHORT_RUN = """
import logging, sys
from minference_vllm.metrics.counters import Counters
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
counters = Counters(publish=True, log_every=10, tally=dict, read_pairs=lambda: (0, 0))
counters.start()
counters.defer(({("sparse", "gate_open"): (5, 1)},))
"""


def test_what_was_counted_last_is_published_and_logged_at_exit(tmp_path):
    assert "MInference: 5 prompt tokens sparse" in run_script(SHORT_RUN, MINFERENCE_METRICS_DIR=str(tmp_path))
    (file,) = tmp_path.iterdir()
    row = {"path": "sparse", "reason": "gate_open", "tokens": 5, "chunks": 1}
    assert json.loads(file.read_text()) == {"prefill": [row], "kept_pairs": 0, "causal_pairs": 0}


ENGINE = """
import sys
from minference_vllm.metrics.counters import Counters
from minference_vllm.metrics.exporter import install
install()
pairs = 0, 0
counters = Counters(publish=True, log_every=0, tally=dict, read_pairs=lambda: pairs)
for kept_pairs in map(int, sys.argv[1:]):
    counters.defer(({("sparse", "gate_open"): (50, 1)},))
    counters.flush()
    pairs = kept_pairs, 4 * kept_pairs
    counters.flush()
"""
API_SERVER = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_multiprocess_mode_sums_engines_where_several_api_servers_read(tmp_path):
    environment = {MULTIPROC_DIR: str(tmp_path)}
    run_script(ENGINE, "0", "0", **environment)
    text = run_script(API_SERVER, **environment)
    assert f"{SPARSE_TOKENS} 100.0" in text
    assert "\nminference_density " not in text

    run_script(ENGINE, "10", "25", **environment)
    text = run_script(API_SERVER, **environment)
    assert f"{SPARSE_TOKENS} 200.0" in text
    assert 'minference_prefill_chunks_total{path="sparse",reason="gate_open"} 4.0' in text
    assert "minference_kept_pairs_total 25.0" in text
    assert "minference_causal_pairs_total 100.0" in text
    assert "minference_density 0.25" in text


def test_worker_side_imports_neither_torch_nor_vllm_nor_prometheus():
    out = run_script(
        "import sys; from minference_vllm.metrics import counters, exporter\n"
        "print([name for name in ('torch', 'vllm', 'prometheus_client') if name in sys.modules])"
    )
    assert out.strip() == "[]"
