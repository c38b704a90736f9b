# SPDX-License-Identifier: Apache-2.0
"""The limits that the sparse server must keep."""

from collections.abc import Mapping
from typing import Any

from benchmarks import DENSE, SPARSE
from benchmarks.soak.found import MEMORIES, Found
from benchmarks.soak.growth import Growth

MOST_ERRORS = 0
"""Requests that failed without being provoked, on either server."""

MOST_RESTARTS = 0
"""Times that a server's process ended or was replaced."""

MOST_LEFT_REQUESTS = 0
"""Requests that a server still holds after its clients have none any more."""

MOST_MIB_PER_HOUR = {"host": 256.0, "gpu": 16.0}
"""The most by which memory may grow, beyond its growth on the dense server: some of vLLM's own processes never stop
growing. The lower end of the sparse server's interval counts, because noise is no growth."""

MOST_STEP_MIB = {"host": 32.0, "gpu": 64.0}
MOST_STEP_SHARE = {"host": 0.005, "gpu": 0.0}
"""From the second to the last third of a stretch, memory may rise by the larger of MOST_STEP_MIB and this share of its
level, beyond its rise on the dense server. A slope would show hardly any leak, because its interval is wide in a few
minutes. In four minutes at eight requests a second, 32 MiB are a leak of 50 KiB a request. On a GPU the allocator takes
some MiB at once."""

NO_GROWTH = Growth(0.0, 0.0, 0.0)

LEAST_SPARSE_TOKENS = 1
"""Prompt tokens of the traffic that the sparse server must run sparse, in every stretch. Otherwise two dense servers
would be compared, which keep every other limit."""

MOST_ITL_RATIO = 1.05
"""The most that the 99th percentile of the time between two tokens of short requests may be, sparse / dense."""


def as_json() -> dict[str, Any]:
    """For the record."""
    return {
        "errors": MOST_ERRORS,
        "restarts": MOST_RESTARTS,
        "left_requests": MOST_LEFT_REQUESTS,
        "mib_per_hour_low": MOST_MIB_PER_HOUR,
        "step_mib": MOST_STEP_MIB,
        "step_share": MOST_STEP_SHARE,
        "sparse_tokens": LEAST_SPARSE_TOKENS,
        "itl_short_p99_ratio": MOST_ITL_RATIO,
    }


def exceeded(found: Mapping[str, Found], watched: tuple[str, ...]) -> list[str]:
    """Limits that one stretch exceeds, in sentences; empty if all are kept.

    Args:
        found: by backend, both.
        watched: memories that must have been measured.
    """
    return of_memory(found, watched) + of_traffic(found)


def of_traffic(found: Mapping[str, Found]) -> list[str]:
    """The exceeded limits other than memory's, of one stretch or of several together."""
    faults = []
    for backend, one in found.items():
        limits = (("errors", MOST_ERRORS), ("restarts", MOST_RESTARTS), ("left_requests", MOST_LEFT_REQUESTS))
        faults += [f"{backend}: {one.counts[name]} {name}" for name, most in limits if one.counts[name] > most]
    dense, sparse = (found[backend].times["itl_short"].quantile(0.99) for backend in (DENSE, SPARSE))
    if dense is None or sparse is None:
        faults.append("no short request was answered: inter-token latency cannot be compared")
    elif sparse > MOST_ITL_RATIO * dense:
        faults.append(f"p99 inter-token latency of short requests is {sparse * 1e3:.2f} ms, dense {dense * 1e3:.2f} ms")
    faults += of_sparse_work(found)
    if found[DENSE].counts["sparse_tokens"]:
        faults.append("prompts ran sparse on the dense server: nothing is compared")
    return faults


def of_sparse_work(found: Mapping[str, Found]) -> list[str]:
    """The limit that is exceeded if the sparse server ran too little sparse."""
    too_few = found[SPARSE].counts["sparse_tokens"] < LEAST_SPARSE_TOKENS
    return ["nothing ran sparse: the traffic shows nothing"] * too_few


def of_memory(found: Mapping[str, Found], watched: tuple[str, ...]) -> list[str]:
    """The exceeded limits of memory. They hold within a stretch: dense's step in another says nothing about it."""
    dense, sparse = found[DENSE], found[SPARSE]
    faults = []
    for name in MEMORIES:
        grown, most, of_dense = sparse.growth[name], MOST_MIB_PER_HOUR[name], dense.growth[name] or NO_GROWTH
        own = grown.low - max(of_dense.per_hour, 0.0) if grown else 0.0
        if own > most:
            faults.append(f"{name} memory grows by {own:.0f} MiB an hour more than dense's; {most:.0f} are allowed")
        step = grown.step - max(of_dense.step, 0.0) if grown else 0.0
        if grown is not None and step > max(MOST_STEP_MIB[name], MOST_STEP_SHARE[name] * grown.level):
            faults.append(f"{name} memory is {step:.0f} MiB higher in the last third than in the second")
        if grown is None and name in watched:
            faults.append(f"too few samples of {name} memory: let the traffic run longer")
    return faults
