# SPDX-License-Identifier: Apache-2.0
"""Metrics where several API servers read them: in prometheus_client's directory."""

import os
import subprocess
import sys
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.values import MultiProcessValue

from minference_vllm import __version__
from minference_vllm.evals.work import parse
from minference_vllm.metrics import publisher
from minference_vllm.metrics.snapshot import Snapshot
from minference_vllm.recall import NUM_BUCKETS, LayerRecall, Recall

SPARSE = 'path="sparse",reason="gate_open"'

# The number of the layer that is measured, then one argument an engine: the pairs that it keeps, of a hundred in all
# its steps; none if its GPU tells nothing.
ENGINES = """
import sys
from collections import Counter
from minference_vllm.metrics import publisher
from minference_vllm.metrics.counters import Counters
from minference_vllm.metrics.snapshot import Snapshot, Times
from minference_vllm.recall import LayerRecall, Recall
publisher.HEADS_SECONDS = 0  # else only the first of the two steps shows
number, *kept = map(int, sys.argv[1:])
for kept_pairs in kept:
    pairs = 0, 0
    recall, times = Recall(), Times()
    engine = Counter({("block", "cuda"): 1})
    told = lambda: Snapshot(Counter(), Counter(), *pairs, recall, 1000, engine, times, 2, 1)
    counters = Counters(log_every=0, tally=dict, read=told)
    for step in (1, 2):
        counters.defer({("sparse", "gate_open"): (50, 1, 1)})
        counters.flush()
        pairs = step * kept_pairs // 2, step * 50 * (kept_pairs > 0)
        layer = LayerRecall(3 * step, (0.0, 2.0 * step), (1.0, kept_pairs / 100))
        recall = Recall((step, *[0] * 8, 2 * step), step, {number: layer})
        times = Times(step, 0.25 * step, 0.5 * step)
        counters.flush()
"""


def run_engines(*kept_pairs: str, directory: Path, layer: int = 0) -> None:
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(directory)}
    subprocess.run([sys.executable, "-c", ENGINES, str(layer), *kept_pairs], env=environment, check=True)


def scrape_multiprocess(directory: Path) -> str:
    registry = prometheus_client.CollectorRegistry()
    MultiProcessCollector(registry, directory)
    return prometheus_client.generate_latest(registry).decode()


def test_multiprocess_mode_sums_engines_where_several_api_servers_read(tmp_path):
    run_engines("0", directory=tmp_path)
    text = scrape_multiprocess(tmp_path)
    assert f"minference_prefill_tokens_total{{{SPARSE}}} 100.0" in text
    assert "\nminference_density " not in text

    run_engines("30", "10", directory=tmp_path)
    text = scrape_multiprocess(tmp_path)
    assert f"minference_prefill_tokens_total{{{SPARSE}}} 300.0" in text
    assert f"minference_prefill_chunks_total{{{SPARSE}}} 6.0" in text
    assert f"minference_requests_total{{{SPARSE}}} 6.0" in text
    assert "minference_kept_pairs_total 40.0" in text
    assert "minference_causal_pairs_total 200.0" in text
    assert "minference_density 0.2\n" in text
    assert 'minference_recall_heads_total{le="0.25"} 6.0' in text
    assert 'minference_recall_heads_total{le="0.98"} 6.0' in text
    assert 'minference_recall_heads_total{le="+Inf"} 18.0' in text
    assert "minference_recall_sum_total 12.0" in text
    assert "minference_guard_heads_total 6.0" in text
    assert 'minference_recall_worst{head="1",layer="0"} 0.1' in text
    assert "minference_scratch_bytes 3000.0" in text
    assert "minference_faults_total 6.0" in text
    assert "minference_broken_ranks 3.0" in text
    assert "minference_timed_layers_total 6.0" in text
    assert "minference_choose_seconds_total 1.5" in text
    assert "minference_attend_seconds_total 3.0" in text
    assert f'minference_info{{kernel="cuda",method="block",version="{__version__}"}} 1.0' in text

    run_engines("30", directory=tmp_path / "missing")  # and nothing is raised


def test_the_mean_recall_of_a_moment_is_true_while_that_of_each_head_waits(tmp_path, monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setattr("prometheus_client.values.ValueClass", MultiProcessValue())
    metrics, pages = publisher.ProcessMetrics(), []
    for recall in (0.94, 0.905):
        histogram = (*[0] * (NUM_BUCKETS - 3), 100, 0, 0)  # from .9 to .95
        layer = LayerRecall(100, (100 * recall,), (recall,))
        metrics.add(Snapshot(recall=Recall(histogram, 0, {0: layer})))
        pages.append(parse(scrape_multiprocess(tmp_path)))
    assert pages[0].recall == pytest.approx(0.94)
    assert (pages[1] - pages[0]).recall == pytest.approx(0.905)


def test_pipeline_stages_show_their_layers_side_by_side(tmp_path):
    for layer, kept_pairs in ((1, "30"), (5, "10")):
        run_engines(kept_pairs, directory=tmp_path, layer=layer)
    text = scrape_multiprocess(tmp_path)
    assert 'minference_recall_worst{head="1",layer="1"} 0.3' in text
    assert 'minference_recall_worst{head="1",layer="5"} 0.1' in text
    assert "minference_kept_pairs_total 40.0" in text
    assert "minference_scratch_bytes 2000.0" in text
