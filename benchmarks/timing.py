# SPDX-License-Identifier: Apache-2.0
"""Measures how long a call takes on its device, and prints progress."""

import functools
import statistics
import time
from collections.abc import Callable

import torch

WARM_UPS = 2
RUNS_IF_FASTER = ((2.0, 15), (50.0, 5), (float("inf"), 3))
"""How many runs are timed for calls that take less than so many milliseconds."""
IDLE_SECONDS = 0.25
FLUSHED_BYTES = 2**30
FLUSHES = 3  # which take about a millisecond

_START = time.monotonic()


def median(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds that the call takes on its device: the median of several runs after WARM_UPS.

    These kernels reach the card's power limit, so its clock depends on what ran before. All begin after the same pause.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        time.sleep(IDLE_SECONDS)
    warm_up = [once(call, device) for _ in range(WARM_UPS)][-1]
    runs = next(runs for ms, runs in RUNS_IF_FASTER if warm_up < ms)
    return statistics.median(once(call, device) for _ in range(runs))


def once(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds that the call takes on its device."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The flushes empty the L2 cache, and keep the GPU busy while the host launches the call.
    for _ in range(FLUSHES):
        _flushed(device).zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def bf16_matmul_tflops(device: torch.device, size: int = 8192) -> float:
    """TFLOP/s that this card's matrix units reach on random data: the limit for every kernel."""
    a, b = torch.randn(2, size, size, dtype=torch.bfloat16, device=device)
    return 2 * size**3 / median(lambda: a @ b, device) / 1e9


def say(text: str) -> None:
    """Print progress, so that a run that is cut off has still shown its figures."""
    print(f"{time.monotonic() - _START:7.1f} s  {text}", flush=True)


@functools.cache
def _flushed(device: torch.device) -> torch.Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
