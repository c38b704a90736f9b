# SPDX-License-Identifier: Apache-2.0
"""Brings what the sparse kernels kept from the GPU to the host, without ever waiting for it."""

import itertools
import threading
from collections import deque

import torch

SLOTS = 64  # copies: a step makes one for each KV cache group, and few steps are ever enqueued ahead of the GPU
PENDING = -1


class DensityMeter:
    """Copies a GPU counter to the host at the end of a step, and hands over the newest copy that has arrived.

    One thread copies, any other may read. The reader makes no CUDA calls, because they could fall into a graph that the
    first thread captures. Instead, a copy has arrived when its slot no longer holds PENDING.

    Args:
        kept_pairs: [1] int64, zero at first; the sparse kernels add to it atomically. It may wrap around.
    """

    def __init__(self, kept_pairs: torch.Tensor) -> None:
        self.kept_pairs = kept_pairs
        # Pinned: only then does a copy from the GPU return at once.
        slots = torch.full((SLOTS,), PENDING, dtype=torch.int64, device="cpu", pin_memory=kept_pairs.is_cuda)
        self._slots = itertools.cycle(slots.split(1))
        self._lock = threading.Lock()  # guards the fields below and the slots
        # Oldest first, each with the causal pairs at the time of the copy. A slot is reused when its copy drops out.
        self._copies: deque[tuple[torch.Tensor, int]] = deque(maxlen=SLOTS)
        self._totals = (0, 0)  # kept and causal pairs, as last read

    def copy(self, causal_pairs_so_far: int) -> None:
        """Enqueue a copy, on the stream that the kernels run on.

        Args:
            causal_pairs_so_far: causal pairs of every sparse launch enqueued since start.
        """
        with self._lock:
            slot = next(self._slots)
            slot.fill_(PENDING)
            slot.copy_(self.kept_pairs, non_blocking=True)
            self._copies.append((slot, causal_pairs_so_far))

    def read(self) -> tuple[int, int]:
        """(kept, causal) pairs since start, both of all launches before the newest copy that has arrived."""
        with self._lock:
            for slot, causal_pairs in reversed(self._copies):
                if (kept := int(slot)) != PENDING:
                    # The counter overflows 64 bits after days of long prompts, but the pairs between two readings
                    # always fit.
                    self._totals = self._totals[0] + (kept - self._totals[0]) % 2**64, causal_pairs
                    break
            return self._totals
