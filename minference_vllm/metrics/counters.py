# SPDX-License-Identifier: Apache-2.0
"""The worker's side of the metrics: a step only leaves its record, a thread counts and reports it."""

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING

from minference_vllm.files import reason
from minference_vllm.metrics.publisher import Publisher
from minference_vllm.metrics.snapshot import Counts, Snapshot

if TYPE_CHECKING:
    from minference_vllm.record import Record, Tally

    Tallier = Callable[[Record], Tally]

PUBLISH_SECONDS = 1.0
MOST_DEFERRED = 2048  # records of some seconds; about 100 MiB if every step has 512 requests

# A child of the "vllm" logger, because vLLM attaches its log handlers to that logger only.
logger = logging.getLogger("vllm.minference.metrics")


class Counters:
    """Counts the prefill of one engine in one of its worker processes, and publishes what there is to tell.

    Every tensor-parallel rank sees the same tokens. Steps therefore leave their records on rank 0 of a pipeline stage
    only: otherwise a scrape would count every token once for each rank.

    Args:
        log_every: seconds between two log lines; 0 never logs.
        tally: says what to count of a record; called in the order of the steps, by one thread at a time.
        read: gives everything else that a Snapshot holds, as far as it has arrived from the GPU.
    """

    def __init__(self, log_every: float, tally: "Tallier", read: Callable[[], Snapshot]) -> None:
        self._log_every, self._tally, self._read = log_every, tally, read
        self._deferred: deque[Record] = deque(maxlen=MOST_DEFERRED)
        # Steps call it, so it is the deque's own method: it is thread-safe and never waits for the counting thread,
        # which a slow disk may hold up. In that case the oldest records are lost uncounted.
        self.defer = self._deferred.append
        self._counting = threading.Lock()  # guards the totals and the tally; never held during I/O
        self._totals: tuple[Counts, Counts, Counts] = Counter(), Counter(), Counter()  # tokens, chunks and requests
        self._reporting = threading.Lock()  # guards what was last published and logged
        self._publisher = Publisher()
        self._published = self._logged = Snapshot()
        self._logged_at = 0.0
        self._has_started = self._has_warned = self._has_warned_of_loss = False
        self._closing = threading.Event()

    def start(self) -> None:
        """Start to report each second and at exit. A second call does nothing."""
        if not self._has_started:
            self._has_started, self._logged_at = True, time.monotonic()
            threading.Thread(target=self._run, name="minference-metrics", daemon=True).start()
            # Unlike an atexit handler, it also runs in workers that were forked, but not in forks of this process.
            Finalize(None, self.close, exitpriority=0)

    def snapshot(self) -> Snapshot:
        """What was counted since start, including all records that steps have left so far."""
        with self._counting:
            self._count()
            tokens, chunks, requests = (counts.copy() for counts in self._totals)
            return replace(self._read(), tokens=tokens, chunks=chunks, requests=requests)

    def _count(self) -> None:
        if len(self._deferred) == MOST_DEFERRED and not self._has_warned_of_loss:
            self._has_warned_of_loss = True
            logger.warning("MInference could not count in time: some prompt tokens are missing in its metrics.")
        while self._deferred:
            try:
                tally = self._tally(self._deferred.popleft())
            except Exception:
                logger.exception("MInference could not count a step; serving and counting go on.")
                continue
            for label, counts in tally.items():
                for total, count in zip(self._totals, counts, strict=True):
                    if count:
                        total[label] += count
            time.sleep(0)  # lets a step run that waits for the interpreter

    def flush(self, at_exit: bool = False) -> None:
        """Publish now what changed since the last time. A directory that cannot be written costs one warning.

        Args:
            at_exit: a missing directory is no fault then: the process that made it has ended first.
        """
        with self._reporting:
            total, last = self.snapshot(), self._published
            if total == last:
                return
            # Set before the attempt, because increments are published: if that fails half way, it is better to lose the
            # other half than to add the first half twice.
            self._published = total
            try:
                self._publisher.publish(total, total - last)
            except OSError as error:
                is_expected = at_exit and isinstance(error, FileNotFoundError)
                if not (is_expected or self._has_warned):
                    self._has_warned = True
                    why = reason(error)  # the folder is one that the server's environment names
                    logger.warning("MInference metrics cannot be written: %s. Serving goes on without them.", why)

    def _run(self) -> None:
        while not self._closing.wait(PUBLISH_SECONDS):
            self.flush()
            if time.monotonic() - self._logged_at >= self._log_every > 0:
                self._log()

    def close(self) -> None:
        """Report for the last time. A process calls it at its end; nothing is reported after it."""
        self._closing.set()
        self.flush(at_exit=True)
        if self._log_every > 0:
            self._log()

    def _log(self) -> None:
        with self._reporting:
            now, total = time.monotonic(), self.snapshot()
            delta, seconds = total - self._logged, now - self._logged_at
            self._logged, self._logged_at = total, now
        if delta.tokens:
            logger.info(delta.summary(seconds))
