# SPDX-License-Identifier: Apache-2.0
"""The API process's side of the metrics: sums what the workers wrote, on each scrape of /metrics."""

import atexit
import contextlib
import functools
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

from minference_vllm.metrics.counters import (
    CAUSAL_PAIRS,
    CHUNKS,
    DENSITY,
    KEPT_PAIRS,
    LABELS,
    METRICS_DIR,
    TOKENS,
    Snapshot,
)

if TYPE_CHECKING:
    from prometheus_client import Metric


@functools.cache
def install() -> None:
    """Give this process and its children a metrics directory, and serve what they write there. Call in every process.

    Each process makes its directory inside its parent's, so the tree of directories is the tree of processes: a server
    counts its own workers alone, also where one vLLM supervisor starts several servers, and what an earlier run left
    behind is never read. The first process starts the tree in MINFERENCE_METRICS_DIR, else in the temporary directory.
    """
    from prometheus_client import REGISTRY

    parent = os.environ.get(METRICS_DIR) or None
    if parent:
        os.makedirs(parent, exist_ok=True)
    directory = tempfile.mkdtemp(prefix="minference-metrics-", dir=parent)
    REGISTRY.register(DirectoryCollector(directory))
    os.environ[METRICS_DIR] = directory
    # A worker's counts outlive it: only the process that started them all cleans up.
    if multiprocessing.parent_process() is None:
        atexit.register(_remove, directory, os.getpid())


def _remove(directory: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked child inherits its parent's exit handlers
        shutil.rmtree(directory, ignore_errors=True)


class DirectoryCollector:
    """Prometheus collector over the files of all workers under `directory`."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def collect(self) -> Iterator["Metric"]:
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        total = sum(read_snapshots(self._directory), start=Snapshot())
        for (name, text), counts in ((TOKENS, total.tokens), (CHUNKS, total.chunks)):
            family = CounterMetricFamily(name, text, labels=LABELS)
            for labels, count in counts.items():
                family.add_metric(labels, count)
            yield family
        yield CounterMetricFamily(*KEPT_PAIRS, value=total.kept_pairs)
        yield CounterMetricFamily(*CAUSAL_PAIRS, value=total.causal_pairs)
        yield GaugeMetricFamily(*DENSITY, value=total.density)  # None: named, without a sample


def read_snapshots(directory: str) -> Iterator[Snapshot]:
    for folder, _, names in os.walk(directory):
        for name in names:
            if name.endswith(".json"):
                with contextlib.suppress(FileNotFoundError), open(os.path.join(folder, name)) as file:
                    yield Snapshot.from_json(file.read())
