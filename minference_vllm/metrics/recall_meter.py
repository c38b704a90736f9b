# SPDX-License-Identifier: Apache-2.0
"""Brings measured recalls from the GPU to the host, without ever waiting for it."""

import itertools
import threading
from collections import deque

import torch

from minference_vllm.recall import LayerRecall, Recall
from minference_vllm.scratch import RecallTotals

SLOTS = 16  # copies on their way: few steps are ever enqueued ahead of the GPU
PENDING = -1.0


class RecallMeter:
    """Copies the totals of a set of layers to the host at the end of a step. See DensityMeter for the threads.

    A stamp is copied after the numbers on the same stream: once the stamp has arrived, so have the numbers.
    """

    def __init__(self, totals: RecallTotals) -> None:
        self._totals = totals
        shape, is_cuda = (SLOTS, len(totals.flat) + 1), totals.flat.is_cuda
        # On the host, whatever the default device is: that may be the GPU, whose memory cannot be pinned.
        slots = torch.full(shape, PENDING, dtype=torch.float64, device="cpu", pin_memory=is_cuda)
        self._slots = itertools.cycle(slots.unbind())
        self._lock = threading.Lock()  # guards the fields below and the slots
        self._copies: deque[torch.Tensor] = deque(maxlen=SLOTS)
        self._last = Recall()  # as last read

    def copy(self) -> None:
        """Enqueue a copy, on the stream that the kernels run on."""
        flat = self._totals.flat
        with self._lock:
            slot = next(self._slots)
            slot[-1].fill_(PENDING)
            slot[:-1].copy_(flat, non_blocking=True)
            slot[-1:].copy_(flat[:1], non_blocking=True)  # the stamp: a count, so never PENDING
            self._copies.append(slot)

    def read(self) -> Recall:
        """All that was measured before the newest copy that has arrived."""
        if (arrived := self._newest()) is not None:
            self._last = _recall_of(RecallTotals.of(arrived, *self._totals.sums.shape))
        return self._last

    def _newest(self) -> torch.Tensor | None:
        """The numbers of the newest copy that has arrived, if one has since the last time.

        They are returned unconverted, because a step may be waiting for the lock.
        """
        with self._lock:
            arrived = None
            # Copies arrive in the order in which they were started.
            while self._copies and float(self._copies[0][-1]) != PENDING:
                arrived = self._copies.popleft()
            return None if arrived is None else arrived[:-1].clone()


def _recall_of(totals: RecallTotals) -> Recall:
    """What totals on the host hold; layers of which nothing was measured are left out."""
    totals_of, worst_of = totals.sums.tolist(), totals.worst.tolist()
    layers = {
        position: LayerRecall(int(chunks), tuple(totals_of[position]), tuple(worst_of[position]))
        for position, chunks in enumerate(totals.chunks.tolist())
        if chunks
    }
    return Recall(tuple(map(int, totals.histogram.tolist())), int(totals.redone.sum()), layers)
