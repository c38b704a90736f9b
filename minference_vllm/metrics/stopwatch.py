# SPDX-License-Identifier: Apache-2.0
"""How long choosing keys and attending to them take, measured now and then, without ever waiting for the GPU."""

import itertools
import time
from collections import deque
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from minference_vllm.metrics.snapshot import Times

PERIOD = 61  # a prime, so that all layers get their turn
SLOTS = 8  # laps that may wait for the GPU at the same time

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")


class HostMark:
    """The time on the host, with the methods of a CUDA event."""

    def record(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: "HostMark") -> float:
        return 1e3 * (later._at - self._at)


class Lap:
    """One layer's attention of one chunk, between three marks."""

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._marks: list[Any] = [torch.cuda.Event(enable_timing=True) if is_cuda else HostMark() for _ in range(3)]

    def timing(self, choose: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
        """`choose`, with the lap's first mark before it and the second after it."""

        def timed(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
            self._marks[0].record()
            chosen = choose(*args, **kwargs)
            self._marks[1].record()
            return chosen

        return timed

    def end(self) -> None:
        self._marks[2].record()

    def is_over(self) -> bool:
        """Whether the GPU has come to the last mark."""
        return bool(self._marks[2].query())

    def times(self) -> Times:
        return Times(1, *(1e-3 * mark.elapsed_time(later) for mark, later in itertools.pairwise(self._marks)))


class Stopwatch:
    """Times every PERIOD-th run of a layer's attention. One thread alone calls it; others may read `total`.

    Args:
        device: whose clock is used: on a GPU, times are the GPU's own.

    Attributes:
        total: of all laps that are known to be over.
    """

    def __init__(self, device: torch.device) -> None:
        self.total = Times()
        self._runs = 0
        # All laps are made beforehand. A lap that was begun but not ended because of an exception is begun again.
        self._idle = [Lap(device) for _ in range(SLOTS)]
        self._ended: deque[Lap] = deque()

    def begin(self) -> Lap | None:
        """The lap that this run is to be timed with; None for most runs."""
        self._runs += 1
        return self._idle[-1] if self._runs % PERIOD == 0 and self._idle else None

    def end(self, lap: Lap) -> None:
        """The run is over, as far as the host knows."""
        lap.end()
        self._ended.append(self._idle.pop())

    def collect(self) -> None:
        """Add the laps that the GPU has finished since the last time.

        A thread that only reads must not call this: querying an event would break the capture of a CUDA graph by
        another thread.
        """
        while self._ended and self._ended[0].is_over():
            lap = self._ended.popleft()
            self.total += lap.times()
            self._idle.append(lap)
