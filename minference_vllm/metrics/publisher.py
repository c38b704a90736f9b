# SPDX-License-Identifier: Apache-2.0
"""Where a worker's counts go, for the processes that serve /metrics to read."""

import functools
import itertools
import os
import threading
import time
from pathlib import Path

import prometheus_client as prometheus

from minference_vllm import __version__
from minference_vllm.metrics import snapshot as names
from minference_vllm.metrics.snapshot import Snapshot

METRICS_DIR = "MINFERENCE_METRICS_DIR"
MULTIPROC_DIR = "PROMETHEUS_MULTIPROC_DIR"
HEADS_SECONDS = 15.0  # between two times that the recall of each head is published
NOWHERE = os.devnull  # what a process that can make no folder sets METRICS_DIR to: its children neither try nor warn


class Publisher:
    """Publishes the totals of one engine; a process may hold several."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self._name = f"{os.getpid()}-{next(self._numbers)}.json"

    def publish(self, total: Snapshot, delta: Snapshot) -> None:
        """Let readers see `total`, which is `delta` more than the last time. Raises OSError if it cannot be written."""
        directory = os.environ.get(METRICS_DIR)
        if MULTIPROC_DIR in os.environ:
            with _process_lock:
                process_metrics().add(delta)
        elif directory and directory != NOWHERE:
            write(Path(directory, self._name), total)


def write(path: Path, total: Snapshot) -> None:
    """Put totals into a file, of which a reader sees the old or the new, never a part. Raises OSError if it cannot."""
    draft = path.with_suffix(".tmp")
    draft.write_text(total.to_json())
    os.replace(draft, path)


class ProcessMetrics:
    """prometheus_client metrics kept in PROMETHEUS_MULTIPROC_DIR, the only place that several API servers read."""

    def __init__(self) -> None:
        # registry=None: the API servers read the directory; this process serves nothing.
        self._tokens, self._chunks = (
            prometheus.Counter(*name, names.LABELS, registry=None) for name in (names.TOKENS, names.CHUNKS)
        )
        self._kept, self._causal = (
            prometheus.Counter(*name, registry=None) for name in (names.KEPT_PAIRS, names.CAUSAL_PAIRS)
        )
        # A ratio has no sum, and prometheus_client no weighted mean: show the process that read its GPU last. Over all
        # processes, density is the ratio of the two pair counters.
        self._density = prometheus.Gauge(*names.DENSITY, registry=None, multiprocess_mode="mostrecent")
        self._redone = prometheus.Counter(*names.REDONE, registry=None)
        self._recall = prometheus.Counter(*names.RECALL, names.RECALL_LABELS, registry=None)
        self._mean, self._worst = (
            prometheus.Gauge(*name, names.HEAD_LABELS, registry=None, multiprocess_mode="mostrecent")
            for name in (names.RECALL_MEAN, names.RECALL_WORST)
        )
        self._scratch = prometheus.Gauge(*names.SCRATCH, registry=None, multiprocess_mode="sum")
        self._info = prometheus.Gauge(*names.INFO, names.INFO_LABELS, registry=None, multiprocess_mode="max")
        self._total = Snapshot()
        self._heads_due = 0.0

    def add(self, delta: Snapshot) -> None:
        self._total += delta
        for family, counts in ((self._tokens, delta.tokens), (self._chunks, delta.chunks)):
            for labels, count in counts.items():
                family.labels(*labels).inc(count)
        self._kept.inc(delta.kept_pairs)
        self._causal.inc(delta.causal_pairs)
        if self._total.density is not None:
            self._density.set(self._total.density)
        self._redone.inc(delta.recall.redone)
        for edge, count in delta.recall.cumulative():
            self._recall.labels(edge).inc(count)
        self._scratch.set(self._total.scratch_bytes)
        for labels in delta.engines:
            self._info.labels(*labels, __version__).set(1)
        # Thousands of them, and the step's thread wants the interpreter too.
        if delta.recall.layers and time.monotonic() >= self._heads_due:
            self._heads_due = time.monotonic() + HEADS_SECONDS
            for layer, head, mean, worst in self._total.recall.heads():
                self._mean.labels(layer, head).set(mean)
                self._worst.labels(layer, head).set(worst)


_process_lock = threading.Lock()  # each engine has a thread that publishes


@functools.cache
def process_metrics() -> ProcessMetrics:
    """Of all engines of this process: a second instance would overwrite the counts of the first in the same file."""
    return ProcessMetrics()
