# SPDX-License-Identifier: Apache-2.0
"""Publishing and scraping, in one process and across the process trees that vLLM builds."""

import multiprocessing
import os
import tempfile
import time
from collections import Counter

import prometheus_client
import pytest

from minference_vllm import __version__
from minference_vllm.metrics import counters as counters_module
from minference_vllm.metrics import exporter
from minference_vllm.metrics.counters import Counters
from minference_vllm.metrics.publisher import METRICS_DIR, MULTIPROC_DIR
from minference_vllm.metrics.snapshot import Snapshot, Times
from minference_vllm.recall import LayerRecall, Recall

SPARSE = 'path="sparse",reason="gate_open"'
SHORT = 'path="dense",reason="short_chunk"'


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

    def __init__(self, log_every: float = 0) -> None:
        self.pairs = 0, 0
        self.recall = Recall()
        self.set_up = 0, Counter()
        self.faults = 0, 0
        self.counters = Counters(log_every, tally=dict, read=self.told)

    def told(self) -> Snapshot:
        return Snapshot(Counter(), Counter(), *self.pairs, self.recall, *self.set_up, Times(), *self.faults)

    def count(self, tokens: int) -> None:
        """One step: a sparse chunk of `tokens` tokens and two short dense ones; a quarter of the pairs kept."""
        self.counters.defer({("sparse", "gate_open"): (tokens, 1, 1), ("dense", "short_chunk"): (12, 2, 1)})
        self.pairs = tokens, 4 * tokens


def serve_one_step(tokens: int) -> None:
    """What a worker process does."""
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


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder in which workers publish, a hundred times as often as in service."""
    monkeypatch.setattr(counters_module, "PUBLISH_SECONDS", 0.01)
    monkeypatch.setenv(METRICS_DIR, str(tmp_path))
    return tmp_path


def published(folder) -> list[Snapshot]:
    return list(exporter.DirectoryCollector(str(folder))._snapshots())


def clear(folder) -> None:
    for file in folder.iterdir():
        file.unlink()


def test_the_thread_publishes_a_change_once(folder):
    worker = Worker()
    worker.counters.start()
    worker.count(100)
    wait_until(lambda: published(folder) == [worker.counters.snapshot()])
    clear(folder)
    time.sleep(0.1)
    assert not list(folder.iterdir())


@pytest.mark.usefixtures("folder")
def test_log_lines_hold_each_token_once_and_idle_time_logs_nothing(log_lines):
    counters = Worker(log_every=0.02).counters
    counters.start()
    counters.defer({("sparse", "gate_open"): (1000, 1, 1)})
    wait_until(lambda: len(log_lines) == 1)
    counters.defer({("sparse", "gate_open"): (234, 1, 1)})
    wait_until(lambda: len(log_lines) == 2)
    time.sleep(0.1)
    assert [line.split(" prompt tokens")[0] for _, line in log_lines] == ["MInference: 1,000", "MInference: 234"]


def test_a_closed_worker_has_told_all_and_tells_nothing_more(folder):
    worker = Worker()
    worker.counters.start()
    worker.count(100)
    worker.counters.close()
    assert published(folder) == [worker.counters.snapshot()]
    clear(folder)
    worker.count(100)
    time.sleep(0.1)
    assert not list(folder.iterdir())


def test_a_worker_with_nothing_to_tell_exports_and_logs_nothing(folder, log_lines):
    Worker(log_every=0.01).counters.start()
    time.sleep(0.1)
    assert not list(folder.iterdir())
    assert not log_lines


def test_faults_and_broken_ranks_are_summed_over_workers(tmp_path, new_process):
    new_process(str(tmp_path))
    exporter.install()
    for faults in ((3, 1), (1, 0), (0, 0)):
        worker = Worker()
        worker.faults = faults
        worker.counters.flush()
    assert "minference_faults_total 4.0" in scrape()
    assert "minference_broken_ranks 1.0" in scrape()


def test_a_directory_that_vanishes_while_serving_costs_one_warning(log_lines):
    exporter.install()
    worker = Worker()
    os.rmdir(os.environ[METRICS_DIR])
    for _ in range(3):
        worker.count(100)
        worker.counters.flush()
    assert [level for level, _ in log_lines] == ["WARNING"]
    assert worker.counters.snapshot().tokens["sparse", "gate_open"] == 300


@pytest.mark.parametrize("name", ["a file", "a file/folder in it"])
def test_a_directory_that_cannot_be_made_costs_one_warning_in_all_processes(name, tmp_path, new_process, log_lines):
    (tmp_path / "a file").touch()
    new_process(str(tmp_path / name))
    exporter.install()
    ((level, line),) = log_lines
    assert level == "WARNING"
    assert "missing on /metrics" in line and str(tmp_path / "a file") in line and METRICS_DIR in line
    assert "minference" not in scrape()
    # Those below it inherit what it says, forked or spawned.
    serve_one_step(100)
    new_process(os.environ[METRICS_DIR])
    serve_one_step(100)
    assert len(log_lines) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "a file"]


def test_engines_of_one_process_sum_in_one_scrape():
    exporter.install()
    for worker, tokens in ((Worker(), 100), (Worker(), 300)):
        worker.count(tokens)
        worker.counters.flush()
    text = scrape()
    assert f"minference_prefill_tokens_total{{{SPARSE}}} 400.0" in text
    assert f"minference_prefill_tokens_total{{{SHORT}}} 24.0" in text
    assert f"minference_prefill_chunks_total{{{SHORT}}} 4.0" in text
    assert f"minference_requests_total{{{SHORT}}} 2.0" in text
    assert "minference_kept_pairs_total 400.0" in text
    assert "minference_causal_pairs_total 1600.0" in text
    assert "minference_density 0.25" in text


def test_installing_twice_serves_once_and_no_density_before_the_first_read_back():
    exporter.install()
    directory = os.environ[METRICS_DIR]
    exporter.install()
    assert os.environ[METRICS_DIR] == directory
    assert scrape().count("# TYPE minference_density gauge") == 1
    assert "\nminference_density " not in scrape()
    assert "minference_kept_pairs_total 0.0" in scrape()


def test_recall_is_summed_over_workers_and_the_worst_is_kept(tmp_path, new_process):
    new_process(str(tmp_path))
    exporter.install()
    for worst in (0.4, 0.2):
        worker = Worker()
        worker.recall = Recall((1, *[0] * 8, 3), 1, {2: LayerRecall(4, (4.0, 3.0 + worst), (1.0, worst))})
        worker.count(7)
        worker.counters.flush()
    text = scrape()
    assert 'minference_recall_heads_total{le="0.9"} 2.0' in text
    assert 'minference_recall_heads_total{le="+Inf"} 8.0' in text
    assert "minference_recall_sum_total 14.6" in text
    assert "minference_guard_heads_total 2.0" in text
    assert 'minference_recall_mean{head="1",layer="2"} 0.825' in text
    assert 'minference_recall_worst{head="1",layer="2"} 0.2' in text


def test_scratch_is_summed_over_workers_and_what_they_run_is_named(tmp_path, new_process):
    new_process(str(tmp_path))
    exporter.install()
    for kernel in ("cuda", "cuda", "triton"):
        worker = Worker()
        worker.set_up = 2**30, Counter({("block", kernel): 1})
        worker.counters.flush()  # before any prompt
    text = scrape()
    assert "minference_scratch_bytes 3.221225472e+09" in text
    for kernel in ("cuda", "triton"):
        assert f'minference_info{{kernel="{kernel}",method="block",version="{__version__}"}} 1.0' in text


def test_a_spawned_engines_worker_shows_in_the_servers_scrape():
    exporter.install()
    run_process(run_engine_core, 100)
    assert f"minference_prefill_tokens_total{{{SPARSE}}} 100.0" in scrape()


def test_runs_that_share_a_users_directory_are_counted_apart(tmp_path, new_process):
    for tokens in (100, 300):
        new_process(str(tmp_path / "made" / "if missing"))
        serve_one_step(tokens)
        assert f"minference_prefill_tokens_total{{{SPARSE}}} {tokens}.0" in scrape()
