# SPDX-License-Identifier: Apache-2.0
"""The API process's side of the metrics: sums what the workers wrote, on each scrape of /metrics."""

import contextlib
import functools
import logging
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from glob import iglob
from multiprocessing.util import Finalize

import prometheus_client as prometheus
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from minference_vllm.metrics.families import FAMILIES
from minference_vllm.metrics.publisher import METRICS_DIR, NOWHERE
from minference_vllm.metrics.snapshot import Snapshot

logger = logging.getLogger("vllm.minference.metrics")


@functools.cache
def install() -> None:
    """Give this process and its children a metrics directory, and serve what they write there. Call in every process.

    Each process makes its directory inside its parent's, so the directories form the same tree as the processes. A
    server therefore counts its own workers only, even where one vLLM supervisor starts several servers, and never reads
    what an earlier run left behind. The first process starts the tree in MINFERENCE_METRICS_DIR, or if that is not set,
    in the temporary directory.
    """
    parent = os.environ.get(METRICS_DIR)
    if parent == NOWHERE:
        return
    try:
        directory = make_directory(parent)
    except OSError as error:
        os.environ[METRICS_DIR] = NOWHERE
        logger.warning(
            "MInference's metrics will be missing on /metrics: no folder can be made for them: %s. "
            "Set %s to a folder that can be written, or leave it unset.", error, METRICS_DIR,
        )  # fmt: skip
        return
    os.environ[METRICS_DIR] = directory
    prometheus.REGISTRY.register(DirectoryCollector(directory))
    # A worker's counts must outlive it, so only the process that started all others cleans up, once it has joined them.
    if multiprocessing.parent_process() is None:
        Finalize(None, shutil.rmtree, (directory,), {"ignore_errors": True}, exitpriority=-1)


def make_directory(parent: str | None) -> str:
    """A new directory in `parent`, which is made if need be; without one, in the temporary directory.

    Raises:
        OSError: it cannot be made.
    """
    if parent:
        os.makedirs(parent, exist_ok=True)
    return tempfile.mkdtemp(prefix="minference-metrics-", dir=parent or None)


class DirectoryCollector:
    """Prometheus collector over the files of all workers under `directory`."""

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def collect(self) -> Iterator[Metric]:
        total = sum(self._snapshots(), start=Snapshot())
        for family in FAMILIES:
            kind = GaugeMetricFamily if family.gauge else CounterMetricFamily
            metric = kind(family.name, family.text, labels=family.labels)
            for labels, value in family.read(total):
                metric.add_metric(labels, value)
            yield metric

    def _snapshots(self) -> Iterator[Snapshot]:
        for name in iglob("**/*.json", root_dir=self._directory, recursive=True):
            with contextlib.suppress(FileNotFoundError), open(os.path.join(self._directory, name)) as file:
                yield Snapshot.from_json(file.read())
