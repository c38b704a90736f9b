# SPDX-License-Identifier: Apache-2.0
"""Publishes a worker's counts where the processes that serve /metrics read them."""

import functools
import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any

import prometheus_client as prometheus

from minference_vllm.metrics.families import FAMILIES, Family
from minference_vllm.metrics.snapshot import Snapshot

METRICS_DIR = "MINFERENCE_METRICS_DIR"
MULTIPROC_DIR = "PROMETHEUS_MULTIPROC_DIR"
HEADS_SECONDS = 15.0  # between two publications of each head's recall
NOWHERE = os.devnull  # METRICS_DIR once no folder could be made: child processes then neither try nor warn


class Publisher:
    """Publishes the totals of one engine, or of its pipeline stage in this process. A process may hold several."""

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
    """Replace a file of totals at once, so that no reader sees a part of it. Raises OSError if it cannot be written."""
    draft = path.with_suffix(".tmp")
    draft.write_text(total.to_json())
    os.replace(draft, path)


class ProcessMetrics:
    """prometheus_client metrics kept in PROMETHEUS_MULTIPROC_DIR, the only place that several API servers read."""

    def __init__(self) -> None:
        # registry=None: the API servers read the directory; this process serves nothing.
        self._metrics = [(family, _metric(family)) for family in FAMILIES]
        self._total = Snapshot()
        self._heads_due = 0.0

    def add(self, delta: Snapshot) -> None:
        self._total += delta
        # There are thousands of values by head, and writing them keeps the interpreter from the thread that runs steps.
        is_due = bool(delta.recall.layers) and time.monotonic() >= self._heads_due
        if is_due:
            self._heads_due = time.monotonic() + HEADS_SECONDS
        for family, metric in self._metrics:
            if family.is_by_head and not is_due:
                continue
            for labels, value in family.read(self._total if family.gauge else delta):
                child = metric.labels(*labels) if labels else metric
                child.set(value) if family.gauge else child.inc(value)


def _metric(family: Family) -> Any:
    if family.gauge:
        return prometheus.Gauge(family.name, family.text, family.labels, registry=None, multiprocess_mode=family.gauge)
    return prometheus.Counter(family.name, family.text, family.labels, registry=None)


_process_lock = threading.Lock()  # each engine has a thread that publishes


@functools.cache
def process_metrics() -> ProcessMetrics:
    """The one instance of this process, for all its engines: a second would overwrite the first one's file."""
    return ProcessMetrics()
