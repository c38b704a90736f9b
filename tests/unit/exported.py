# SPDX-License-Identifier: Apache-2.0
"""What the package puts on /metrics, and what of that a PromQL expression asks for."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minference_vllm.metrics.exporter import DirectoryCollector
from minference_vllm.metrics.publisher import write
from minference_vllm.metrics.snapshot import Snapshot, Times
from minference_vllm.recall import LayerRecall, Recall

PREFIX = "minference_"
# Variables of dashboards, as a data source is asked with them.
VARIABLES = {"$__rate_interval": "5m", "$job": "vllm", "$instance": "host:8000"}


def exported(folder: Path) -> dict[str, tuple[str, set[str]]]:
    """Type and labels by name, of a server on which everything has happened."""
    counts = Counter({("sparse", "gate_open"): 1})
    recall = Recall(tuple(range(10)), 3, {0: LayerRecall(9, (8.25,), (0.5,))})
    write(
        folder / "worker.json",
        Snapshot(counts, counts, 2, 3, recall, 4, Counter({("block", "cuda"): 1}), Times(1, 0.1, 0.2), 5, 1, counts),
    )
    return {
        sample.name: (family.type, set(sample.labels))
        for family in DirectoryCollector(str(folder)).collect()
        for sample in family.samples
    }


def selectors(query: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Name of each metric that a query asks for, and its labels' values. Raises ValueError if it is no query."""
    return (
        (node.name, {matcher.name: matcher.value for matcher in node.matchers.matchers})
        for node in _nodes(query)
        if hasattr(node, "matchers")
    )


def groupings(query: str) -> set[str]:
    """Labels by which a query groups."""
    modifiers = (getattr(node, "modifier", None) for node in _nodes(query) if hasattr(node, "expr"))
    return {label for modifier in modifiers if modifier for label in modifier.labels}


def _nodes(query: str) -> Iterator[Any]:
    import promql_parser

    for variable, value in VARIABLES.items():
        query = query.replace(variable, value)
    left = [promql_parser.parse(query)]
    while left:
        node = left.pop()
        yield node
        for name in ("expr", "lhs", "rhs", "vector_selector", "args"):
            child = getattr(node, name, None)
            left += child if isinstance(child, list) else filter(None, [child])
