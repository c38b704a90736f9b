# SPDX-License-Identifier: Apache-2.0
"""Looks at a server every few seconds: its memory, and what its /metrics say."""

import asyncio
import http.client
import itertools
import os
import subprocess
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.soak.growth import Growth, growth

EVERY_S = 2.0
SCRAPE_TIMEOUT_S = 30.0
MIB = 2**20
STARTED = "process_start_time_seconds"
RUNNING, WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
PREEMPTED = "vllm:num_preemptions_total"
WATCHED = (STARTED, RUNNING, WAITING, PREEMPTED)


@dataclass(frozen=True, slots=True)
class Sample:
    """A server at one time.

    Attributes:
        at_s: on the monotonic clock.
        host_mib: resident memory of its processes together, each with what they share. None if it does not run here.
        gpu_mib: memory used on the server's GPUs, by any process; None without a GPU.
        totals: the metrics in WATCHED, from its /metrics; None if the page could not be read.
    """

    at_s: float
    host_mib: float | None
    gpu_mib: float | None
    totals: dict[str, float] | None


class Watch:
    """Samples a server from a thread while the traffic runs.

    Args:
        url: the server's.
        process: the first of its processes, if they run here.
        has_gpu: whether to ask nvidia-smi for its memory.
    """

    def __init__(self, url: str, process: int | None, has_gpu: bool) -> None:
        self._url, self._process, self._has_gpu = url, process, has_gpu
        self.samples: list[Sample] = []

    async def run(self) -> None:
        """Take samples until cancelled."""
        while True:
            self.samples.append(await asyncio.to_thread(self.sample))
            await asyncio.sleep(EVERY_S)

    def sample(self) -> Sample:
        host = resident_mib(self._process) if self._process else None
        totals = None
        with suppress(OSError, http.client.HTTPException):
            totals = read_totals(scrape(self._url))
        return Sample(time.monotonic(), host, gpu_mib() if self._has_gpu else None, totals)

    @property
    def restarts(self) -> int:
        """How often another process answered than the time before."""
        starts = [sample.totals[STARTED] for sample in self.samples if sample.totals and STARTED in sample.totals]
        return sum(one != other for one, other in itertools.pairwise(starts))

    @property
    def unread(self) -> int:
        """How often /metrics could not be read."""
        return sum(sample.totals is None for sample in self.samples)

    @property
    def preemptions(self) -> int:
        read = [sample.totals.get(PREEMPTED, 0.0) for sample in self.samples if sample.totals]
        return int(read[-1] - read[0]) if read else 0

    def growth(self) -> dict[str, Growth | None]:
        """Growth of host and GPU memory."""
        kinds: dict[str, Callable[[Sample], float | None]] = {
            "host": lambda sample: sample.host_mib,
            "gpu": lambda sample: sample.gpu_mib,
        }
        found: dict[str, Growth | None] = {}
        for name, of in kinds.items():
            known = [(sample.at_s, mib) for sample in self.samples if (mib := of(sample)) is not None]
            found[name] = growth([at for at, _ in known], [mib for _, mib in known])
        return found


def scrape(url: str) -> str:
    # No proxy: to a proxy that the environment names, localhost is another machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/metrics", timeout=SCRAPE_TIMEOUT_S) as response:
        return str(response.read().decode())


def read_totals(page: str) -> dict[str, float]:
    """The sum of the samples of each metric in WATCHED. Only these lines are parsed: traffic needs this process too."""
    lines = "\n".join(line for line in page.splitlines() if line.startswith(WATCHED))
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(f"{lines}\n"):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0.0) + sample.value
    return totals


def resident_mib(process: int) -> float | None:
    """Memory of a process and of all that it has started; None once it is gone."""
    try:
        first = psutil.Process(process)
        family = [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return None
    total = 0
    for member in family:
        with suppress(psutil.NoSuchProcess):
            total += member.memory_info().rss
    return total / MIB


def gpu_mib() -> float:
    """Memory used on the GPUs that a server started here would see, by nvidia-smi. Other GPUs may run other jobs."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible.replace(' ', '')}")  # numbers or UUIDs
    said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return sum(map(float, said.split()))
