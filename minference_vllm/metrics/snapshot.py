# SPDX-License-Identifier: Apache-2.0
"""What is counted, and its names on /metrics."""

import json
from collections import Counter
from dataclasses import dataclass, field

from minference_vllm.recall import Recall

# Name and help text; Prometheus appends _total to the name of a counter.
TOKENS = ("minference_prefill_tokens", "Prompt tokens by attention path, and why they took it.")
CHUNKS = ("minference_prefill_chunks", "Prefill chunks by attention path, and why they took it.")
LABELS = ("path", "reason")
KEPT_PAIRS = ("minference_kept_pairs", "Query-key pairs that sparse attention computed.")
CAUSAL_PAIRS = ("minference_causal_pairs", "Query-key pairs that dense attention would have computed in their place.")
DENSITY = ("minference_density", "Kept / causal pairs of all sparse attention since start, the guard's included.")
RECALL = ("minference_recall_heads", "Heads of measured chunks whose recall is at most le.")
RECALL_LABELS = ("le",)
REDONE = ("minference_guard_heads", "Heads of chunks that the guard attended to again, to all keys.")
RECALL_MEAN = (
    "minference_recall_mean",
    "Mean recall since start by the plugin's layers and rank 0's heads, each from 0, over the engines of this server.",
)
RECALL_WORST = ("minference_recall_worst", "Smallest recall of a chunk since start, as minference_recall_mean.")
HEAD_LABELS = ("layer", "head")
SCRATCH = ("minference_scratch_bytes", "Scratch memory of each engine's rank 0, summed over the engines.")
INFO = ("minference_info", "1 for the method and the kernels that an engine runs, and the version of the plugin.")
INFO_LABELS = ("method", "kernel", "version")

Counts = Counter[tuple[str, str]]
"""By path and reason, or by other two words."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Totals since start, or what came between two of them.

    Attributes:
        tokens, chunks: of prompts, by path and reason.
        kept_pairs, causal_pairs: of all sparse attention.
        recall: of all sparse attention.
        scratch_bytes: claimed.
        engines: by method and kernel.
    """

    tokens: Counts = field(default_factory=Counter)
    chunks: Counts = field(default_factory=Counter)
    kept_pairs: int = 0
    causal_pairs: int = 0
    recall: Recall = field(default_factory=Recall)
    scratch_bytes: int = 0
    engines: Counts = field(default_factory=Counter)

    @property
    def density(self) -> float | None:
        """Kept / causal pairs, above 1 if the guard had most heads attend again; None before the first read-back."""
        return self.kept_pairs / self.causal_pairs if self.causal_pairs else None

    def __add__(self, other: "Snapshot") -> "Snapshot":
        pairs = self.kept_pairs + other.kept_pairs, self.causal_pairs + other.causal_pairs
        counts = self.tokens + other.tokens, self.chunks + other.chunks
        set_up = self.scratch_bytes + other.scratch_bytes, self.engines + other.engines
        return Snapshot(*counts, *pairs, self.recall + other.recall, *set_up)

    def __sub__(self, other: "Snapshot") -> "Snapshot":
        pairs = self.kept_pairs - other.kept_pairs, self.causal_pairs - other.causal_pairs
        counts = self.tokens - other.tokens, self.chunks - other.chunks
        set_up = self.scratch_bytes - other.scratch_bytes, self.engines - other.engines
        return Snapshot(*counts, *pairs, self.recall - other.recall, *set_up)

    def to_json(self) -> str:
        prefill = [(*label, tokens, self.chunks[label]) for label, tokens in self.tokens.items()]
        engines = [(*labels, count) for labels, count in self.engines.items()]
        sizes = {
            "kept_pairs": self.kept_pairs, "causal_pairs": self.causal_pairs, "scratch_bytes": self.scratch_bytes
        }  # fmt: skip
        return json.dumps({"prefill": prefill, **sizes, "engines": engines, "recall": self.recall.to_json()})

    @classmethod
    def from_json(cls, text: str) -> "Snapshot":
        totals = json.loads(text)
        prefill, recall = totals.pop("prefill"), Recall.from_json(totals.pop("recall"))
        tokens = Counter({(path, reason): tokens for path, reason, tokens, _ in prefill})
        chunks = Counter({(path, reason): chunks for path, reason, _, chunks in prefill})
        engines = Counter({(method, kernel): count for method, kernel, count in totals.pop("engines")})
        return cls(tokens, chunks, **totals, engines=engines, recall=recall)

    def summary(self, seconds: float) -> str:
        """The log line for what was counted in this many seconds."""
        dense = Counter({reason: tokens for (path, reason), tokens in self.tokens.items() if path == "dense"})
        reasons = ", ".join(f"{reason} {tokens:,}" for reason, tokens in dense.most_common())
        density = "density not read yet" if self.density is None else f"density {self.density:.1%}"
        return (
            f"MInference: {self.tokens.total() - dense.total():,} prompt tokens sparse, {dense.total():,} dense"
            f"{f' ({reasons})' if reasons else ''} in {seconds:.0f} s; {density}{self._guarded()}"
        )

    def _guarded(self) -> str:
        recall = self.recall
        return f"; {recall.redone:,} of {recall.measured:,} heads again dense" if recall.redone else ""
