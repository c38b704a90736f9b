# SPDX-License-Identifier: Apache-2.0
"""The worker's side of the metrics: a step only leaves what is to count, a thread counts and publishes it."""

import atexit
import functools
import json
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

METRICS_DIR = "MINFERENCE_METRICS_DIR"
MULTIPROC_DIR = "PROMETHEUS_MULTIPROC_DIR"
PUBLISH_SECONDS = 1.0
MOST_DEFERRED = 2048  # batches: seconds, or some 100 MiB of batches with 512 requests each

# Name and help text; Prometheus appends _total to the name of a counter.
LABELS = ("path", "reason")
TOKENS = ("minference_prefill_tokens", "Prompt tokens by attention path, and why they took it.")
CHUNKS = ("minference_prefill_chunks", "Prefill chunks by attention path, and why they took it.")
KEPT_PAIRS = ("minference_kept_pairs", "Query-key pairs that sparse attention computed.")
CAUSAL_PAIRS = ("minference_causal_pairs", "Query-key pairs that dense attention would have computed in their place.")
DENSITY = ("minference_density", "Kept / causal pairs of all sparse attention since start.")

Tally = Mapping[tuple[str, str], tuple[int, int]]
"""Tokens and chunks by path and reason."""

# vLLM's log handlers hang on the "vllm" logger only.
logger = logging.getLogger("vllm.minference.metrics")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Totals since start, or what came between two of them; tokens and chunks by (path, reason)."""

    tokens: Counter[tuple[str, str]] = field(default_factory=Counter)
    chunks: Counter[tuple[str, str]] = field(default_factory=Counter)
    kept_pairs: int = 0
    causal_pairs: int = 0

    @property
    def density(self) -> float | None:
        """Kept / causal pairs, in [0, 1]; None before the first read-back from the GPU."""
        return self.kept_pairs / self.causal_pairs if self.causal_pairs else None

    def __add__(self, other: Self) -> "Snapshot":
        return Snapshot(
            self.tokens + other.tokens,
            self.chunks + other.chunks,
            self.kept_pairs + other.kept_pairs,
            self.causal_pairs + other.causal_pairs,
        )

    def __sub__(self, other: Self) -> "Snapshot":
        return Snapshot(
            self.tokens - other.tokens,
            self.chunks - other.chunks,
            self.kept_pairs - other.kept_pairs,
            self.causal_pairs - other.causal_pairs,
        )

    def to_json(self) -> str:
        prefill = [
            {"path": path, "reason": reason, "tokens": tokens, "chunks": self.chunks[path, reason]}
            for (path, reason), tokens in self.tokens.items()
        ]
        return json.dumps({"prefill": prefill, "kept_pairs": self.kept_pairs, "causal_pairs": self.causal_pairs})

    @classmethod
    def from_json(cls, text: str) -> Self:
        record = json.loads(text)
        return cls(
            Counter({(row["path"], row["reason"]): row["tokens"] for row in record["prefill"]}),
            Counter({(row["path"], row["reason"]): row["chunks"] for row in record["prefill"]}),
            record["kept_pairs"],
            record["causal_pairs"],
        )


def summary(delta: Snapshot, seconds: float) -> str:
    """The log line for what was counted in the last `seconds`."""
    sparse = sum(tokens for (path, _), tokens in delta.tokens.items() if path == "sparse")
    dense = Counter({reason: tokens for (path, reason), tokens in delta.tokens.items() if path == "dense"})
    reasons = ", ".join(f"{reason} {tokens:,}" for reason, tokens in dense.most_common())
    density = "density not read yet" if delta.density is None else f"density {delta.density:.1%}"
    return (
        f"MInference: {sparse:,} prompt tokens sparse, {dense.total():,} dense{f' ({reasons})' if reasons else ''}"
        f" in {seconds:.0f} s; {density}"
    )


class Counters:
    """Counts one worker process's prefill; one instance a process, since its file is named by the process id.

    Every tensor-parallel rank sees the same tokens: only rank 0 of an engine may publish, or a scrape would count them
    once a rank.

    Args:
        publish: export and log; False on every rank but 0.
        log_every: seconds between two log lines; 0 never logs.
        tally: says what to count of what was left to `defer`; called in its order, by one thread at a time.
        read_pairs: gives the kept and the causal pairs since start, as far as the GPU has told.
    """

    def __init__(
        self, publish: bool, log_every: float, tally: Callable[..., Tally], read_pairs: Callable[[], tuple[int, int]]
    ) -> None:
        self._publish = publish
        self._log_every = log_every
        self._tally = tally
        self._read_pairs = read_pairs
        self._deferred: deque[tuple[Any, ...]] = deque(maxlen=MOST_DEFERRED)
        # Have a tuple of arguments of `tally` counted later. A step calls it, so it is the bare method: thread-safe,
        # and never waiting for the thread, which a disk may hold up; then the oldest go uncounted.
        self.defer = self._deferred.append
        self._lock = threading.Lock()  # the totals, and who tallies; never held for I/O
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._chunks: Counter[tuple[str, str]] = Counter()
        self._publish_lock = threading.Lock()  # what was published and logged; the thread and flush() may both publish
        self._thread: threading.Thread | None = None
        self._pid = 0
        self._published = self._logged = Snapshot()
        self._logged_at = 0.0
        self._warned = self._warned_of_loss = False

    def snapshot(self) -> Snapshot:
        with self._lock:
            self._settle()
            return Snapshot(self._tokens.copy(), self._chunks.copy(), *self._read_pairs())

    def _settle(self) -> None:
        """Count what was deferred; the caller holds the lock."""
        if len(self._deferred) == MOST_DEFERRED and not self._warned_of_loss:
            logger.warning("MInference could not count in time: some prompt tokens are missing in its metrics.")
            self._warned_of_loss = True
        while self._deferred:
            try:
                tallied = self._tally(*self._deferred.popleft())
            except Exception:
                logger.exception("MInference could not count a step; serving and counting go on.")
                continue
            for label, (tokens, chunks) in tallied.items():
                self._tokens[label] += tokens
                self._chunks[label] += chunks
            time.sleep(0)  # a step may be waiting for the interpreter

    def flush(self) -> None:
        """Publish now what changed since the last time. A directory that cannot be written costs one warning."""
        if not self._publish:
            return
        with self._publish_lock:
            total, last = self.snapshot(), self._published
            if total == last:
                return
            # Before the attempt: multiprocess counters take increments, and half of them applied twice is worse than
            # half of them lost.
            self._published = total
            try:
                if MULTIPROC_DIR in os.environ:
                    multiprocess_metrics().add(total - last, total.density)
                elif directory := os.environ.get(METRICS_DIR):
                    write_atomically(Path(directory, f"{os.getpid()}.json"), total.to_json())
            except OSError as error:
                if not self._warned:
                    logger.warning("MInference metrics cannot be written: %s. Serving goes on without them.", error)
                self._warned = True

    def start(self) -> None:
        """Start the thread, if there is none and this worker publishes."""
        with self._publish_lock:
            if self._thread is not None or not self._publish:
                return
            self._logged_at, self._pid = time.monotonic(), os.getpid()
            self._thread = threading.Thread(target=self._run, name="minference-metrics", daemon=True)
            self._thread.start()
        atexit.register(self._finish)

    def _run(self) -> None:
        while True:
            time.sleep(PUBLISH_SECONDS)
            self.flush()
            if 0 < self._log_every <= time.monotonic() - self._logged_at:
                self._log()

    def _finish(self) -> None:
        if os.getpid() != self._pid:  # a fork's exit; what its parent has counted is its parent's
            return
        self.flush()
        if self._log_every > 0:
            self._log()

    def _log(self) -> None:
        with self._publish_lock:
            now, total = time.monotonic(), self.snapshot()
            delta, seconds = total - self._logged, now - self._logged_at
            self._logged, self._logged_at = total, now
        if delta.tokens:
            logger.info(summary(delta, seconds))


def write_atomically(path: Path, text: str) -> None:
    """A reader of `path` sees the old text or the new one, never a part."""
    draft = path.with_suffix(".tmp")
    draft.write_text(text)
    os.replace(draft, path)


class MultiprocessMetrics:
    """prometheus_client metrics kept in PROMETHEUS_MULTIPROC_DIR, the only place that several API servers read."""

    def __init__(self) -> None:
        import prometheus_client as prometheus

        # registry=None: the API servers read the directory; this process serves nothing.
        self._tokens = prometheus.Counter(*TOKENS, LABELS, registry=None)
        self._chunks = prometheus.Counter(*CHUNKS, LABELS, registry=None)
        self._kept_pairs = prometheus.Counter(*KEPT_PAIRS, registry=None)
        self._causal_pairs = prometheus.Counter(*CAUSAL_PAIRS, registry=None)
        # A ratio has no sum, and prometheus_client no weighted mean: show the engine that read its GPU last. Over all
        # engines, density is the ratio of the two pair counters.
        self._density = prometheus.Gauge(*DENSITY, registry=None, multiprocess_mode="mostrecent")

    def add(self, delta: Snapshot, density: float | None) -> None:
        for labels, tokens in delta.tokens.items():
            self._tokens.labels(*labels).inc(tokens)
        for labels, chunks in delta.chunks.items():
            self._chunks.labels(*labels).inc(chunks)
        self._kept_pairs.inc(delta.kept_pairs)
        self._causal_pairs.inc(delta.causal_pairs)
        if density is not None:
            self._density.set(density)


@functools.cache
def multiprocess_metrics() -> MultiprocessMetrics:
    """This process's metrics; a second instance would overwrite the counts of the first in the shared file."""
    return MultiprocessMetrics()
