# SPDX-License-Identifier: Apache-2.0
"""The metrics: names on /metrics, what they say there, and where their values come from."""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from minference_vllm import __version__
from minference_vllm.metrics.snapshot import Snapshot

Samples = Iterable[tuple[tuple[str, ...], float]]
"""Values of a metric, each with the values of its labels."""
Gauge = Literal["", "mostrecent", "sum", "max"]


class Family(NamedTuple):
    """A metric.

    Attributes:
        name: without the suffix _total, which Prometheus appends to the names of counters.
        text: what HELP says.
        read: takes the values from a snapshot.
        labels: names of the labels.
        gauge: how prometheus_client merges a gauge of several processes; empty for a counter, which is summed.
        is_by_head: whether there is one value for each head of each layer.
    """

    name: str
    text: str
    read: Callable[[Snapshot], Samples]
    labels: tuple[str, ...] = ()
    gauge: Gauge = ""
    is_by_head: bool = False


def number(name: str, text: str, read: Callable[[Snapshot], float | None], gauge: Gauge = "") -> Family:
    """A metric without labels; it has no value where `read` gives None."""
    return Family(name, text, lambda total: [] if (value := read(total)) is None else [((), value)], gauge=gauge)


PATH, HEAD = ("path", "reason"), ("layer", "head")
TOKENS = Family(
    "minference_prefill_tokens", "Prompt tokens by attention path, and why they took it.",
    lambda total: total.tokens.items(), PATH,
)  # fmt: skip
CHUNKS = Family(
    "minference_prefill_chunks", "Prefill chunks by attention path, and why they took it.",
    lambda total: total.chunks.items(), PATH,
)  # fmt: skip
REQUESTS = Family(
    "minference_requests", "Requests whose prompts were read to their end, by the path of that, and why they took it.",
    lambda total: total.requests.items(), PATH,
)  # fmt: skip
FAULTS = number(
    "minference_faults", "Exceptions that the plugin met while it started or served, on all ranks.",
    lambda total: total.faults,
)  # fmt: skip
BROKEN = number(
    "minference_broken_ranks", "Ranks on which all runs dense until the next start, since sparse attention failed.",
    lambda total: total.broken_ranks, "sum",
)  # fmt: skip
KEPT_PAIRS = number(
    "minference_kept_pairs", "Query-key pairs that sparse attention computed.", lambda total: total.kept_pairs
)
CAUSAL_PAIRS = number(
    "minference_causal_pairs", "Query-key pairs that dense attention would have computed in their place.",
    lambda total: total.causal_pairs,
)  # fmt: skip
# A ratio cannot be summed. Where prometheus_client merges the processes (PROMETHEUS_MULTIPROC_DIR), it shows that of
# the process that read its GPU last; the ratio over all of them is that of the two counters of pairs.
DENSITY = number(
    "minference_density", "Kept / causal pairs of all sparse attention since start, the guard's included.",
    lambda total: total.density, "mostrecent",
)  # fmt: skip
CHOOSE = number(
    "minference_choose_seconds", "Time of choosing keys, in the layers of chunks that were timed.",
    lambda total: total.times.choose,
)  # fmt: skip
ATTEND = number(
    "minference_attend_seconds",
    "Time of attending to the kept keys, the guard included, in the layers of chunks that were timed.",
    lambda total: total.times.attend,
)
TIMED = number(
    "minference_timed_layers", "Layers of chunks that were timed, one of many.", lambda total: total.times.laps
)
REDONE = number(
    "minference_guard_heads", "Heads of chunks that the guard attended to again, to all keys.",
    lambda total: total.recall.redone,
)  # fmt: skip
RECALL = Family(
    "minference_recall_heads", "Heads of measured chunks whose recall is at most le.",
    lambda total: (((edge,), count) for edge, count in total.recall.cumulative()), ("le",),
)  # fmt: skip
RECALL_SUM = number(
    "minference_recall_sum", "Sum of recall over the heads of measured chunks.",
    lambda total: sum(sum(layer.totals) for layer in total.recall.layers.values()),
)  # fmt: skip
RECALL_MEAN = Family(
    "minference_recall_mean",
    "Mean recall since start by the model's layers and rank 0's heads, each from 0, over the engines of this server.",
    lambda total: (((layer, head), mean) for layer, head, mean, _ in total.recall.heads()), HEAD, "mostrecent", True,
)  # fmt: skip
RECALL_WORST = Family(
    "minference_recall_worst", "Smallest recall of a chunk since start, as minference_recall_mean.",
    lambda total: (((layer, head), worst) for layer, head, _, worst in total.recall.heads()), HEAD, "mostrecent", True,
)  # fmt: skip
SCRATCH = number(
    "minference_scratch_bytes", "Scratch memory of rank 0 of each pipeline stage, summed over stages and engines.",
    lambda total: total.scratch_bytes, "sum",
)  # fmt: skip
INFO = Family(
    "minference_info", "1 for the method and the kernels that an engine runs, and the version of the plugin.",
    lambda total: (((*engine, __version__), 1) for engine in total.engines), ("method", "kernel", "version"), "max",
)  # fmt: skip
FAMILIES = (
    TOKENS, CHUNKS, REQUESTS, FAULTS, BROKEN, KEPT_PAIRS, CAUSAL_PAIRS, DENSITY, CHOOSE, ATTEND, TIMED, REDONE, RECALL,
    RECALL_SUM, RECALL_MEAN, RECALL_WORST, SCRATCH, INFO,
)  # fmt: skip
