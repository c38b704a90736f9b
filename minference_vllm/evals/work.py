# SPDX-License-Identifier: Apache-2.0
"""What a server's sparse path has done, as read from its /metrics."""

import math
import operator
import time
from collections.abc import Callable

from minference_vllm.errors import ConfigError, shortened
from minference_vllm.evals.errors import ServerError
from minference_vllm.evals.extras import need
from minference_vllm.evals.line import Line
from minference_vllm.metrics import families as names
from minference_vllm.metrics.families import Family
from minference_vllm.recall import RECALL_EDGES

SPARSE = "sparse"
POLL_S = 0.3
# Workers publish once a second: counts that have not changed for longer are complete.
STILL_S = 1.3
LONGEST_WAIT_S = 20.0
ROUNDING = 1e-3


class Work(Line):
    """Counts since the server's start, or the difference between two readings."""

    sparse_tokens: int = 0
    dense_tokens: int = 0
    kept_pairs: int = 0
    causal_pairs: int = 0
    measured_heads: int = 0
    """Heads of chunks whose recall was measured."""
    redone_heads: int = 0
    """Measured heads that the guard had attend to all keys."""
    recalls: float = 0.0
    """Sum of recall over the measured heads."""
    least_recalls: float = 0.0
    """Lower bound of that sum, from the histogram of recalls."""
    most_recalls: float = 0.0
    """Upper bound of that sum."""
    exported: bool = False
    """Whether the server has such metrics at all."""
    broken_ranks: int = 0
    """Ranks on which everything runs dense, at the later of the two readings."""

    @property
    def tokens(self) -> int:
        return self.sparse_tokens + self.dense_tokens

    @property
    def density(self) -> float | None:
        """Kept / causal pairs of what ran sparse."""
        return self.kept_pairs / self.causal_pairs if self.causal_pairs else None

    @property
    def recall(self) -> float | None:
        """Mean over layers, heads and chunks, before the guard acted.

        None where the server's numbers contradict each other: an older version exports no sums, for example.
        """
        if (
            not self.measured_heads
            or not self.least_recalls <= self.recalls + ROUNDING <= self.most_recalls + 2 * ROUNDING
        ):
            return None
        return self.recalls / self.measured_heads

    @property
    def redone(self) -> float | None:
        """Share of heads of chunks that the guard had attend to all keys."""
        return self.redone_heads / self.measured_heads if self.measured_heads else None

    def refuse_sparse(self, url: str) -> None:
        """Check that these are the counts of a dense server.

        Raises:
            ConfigError: something ran sparse on it.
        """
        if self.sparse_tokens:
            raise ConfigError(
                f"{url} is to be the dense server, but {self.sparse_tokens:,} prompt tokens ran sparse on it. "
                "Serve it with another --attention-backend, FLASH_ATTN for one."
            )

    def refuse_broken(self, url: str) -> None:
        """Check that these are the counts of a server that can run sparse.

        Raises:
            ServerError: sparse attention has failed on it for good.
        """
        if self.broken_ranks:
            raise ServerError(
                f"Sparse attention has failed on {url}, where all runs dense until its next start: a comparison tells "
                "nothing. Its log has the traceback; run this again once that is mended, to go on."
            )

    def __add__(self, other: "Work") -> "Work":
        return self._with(other, 1)

    def __sub__(self, other: "Work") -> "Work":
        return self._with(other, -1)

    def _with(self, other: "Work", sign: int) -> "Work":
        counts = {name: getattr(self, name) + sign * getattr(other, name) for name in COUNTS}
        return Work(**counts, exported=self.exported or other.exported, broken_ranks=self.broken_ranks)


COUNTS = tuple(name for name in Work.model_fields if name not in ("exported", "broken_ranks"))


def parse(text: str) -> Work:
    """The counts on a page of /metrics.

    Raises:
        ServerError: it is no such page.
    """
    try:
        return _counted(text)
    except (ArithmeticError, LookupError, ValueError) as error:
        raise ServerError(f"The server's /metrics cannot be read: {shortened(error, str)}.") from None


def _counted(text: str) -> Work:
    families = need("prometheus_client.parser").text_string_to_metric_families(text)
    samples = [sample for family in families for sample in family.samples]

    def summed(family: Family, **labels: str) -> float:
        found = f"{family.name}_total"
        return sum(s.value for s in samples if s.name == found and labels.items() <= s.labels.items())

    def total(family: Family, **labels: str) -> int:
        return int(summed(family, **labels))

    recalls = summed(names.RECALL_SUM)
    tokens, sparse_tokens = total(names.TOKENS), total(names.TOKENS, path=SPARSE)
    edges = (*map(str, RECALL_EDGES), "+Inf")
    up_to = [total(names.RECALL, le=edge) for edge in edges]
    buckets = [count - below for count, below in zip(up_to, [0, *up_to], strict=False)]
    return Work(
        sparse_tokens=sparse_tokens,
        dense_tokens=tokens - sparse_tokens,
        kept_pairs=total(names.KEPT_PAIRS),
        causal_pairs=total(names.CAUSAL_PAIRS),
        measured_heads=up_to[-1],
        redone_heads=total(names.REDONE),
        recalls=recalls if math.isfinite(recalls) else 0.0,
        least_recalls=sum(map(operator.mul, buckets, (0.0, *RECALL_EDGES))),
        most_recalls=sum(map(operator.mul, buckets, (*RECALL_EDGES, 1.0))),
        exported=any(sample.name == f"{names.KEPT_PAIRS.name}_total" for sample in samples),
        broken_ranks=int(sum(sample.value for sample in samples if sample.name == names.BROKEN.name)),
    )


def settled(read: Callable[[], Work], before: Work, prompt_tokens: int, prompts: int) -> Work:
    """The counts, once they include all of these prompts; the server's lag by a second or two.

    Args:
        read: fetches the counts.
        before: the counts before the prompts were sent.
        prompt_tokens: of all prompts together.
        prompts: how many there are. The last token of each may be read as a decode row, which is not counted.
    """
    last = read()
    if not last.exported:
        return last
    began = changed = time.monotonic()
    while (now := time.monotonic()) - began < LONGEST_WAIT_S:
        if last.tokens - before.tokens >= prompt_tokens - prompts and now - changed >= STILL_S:
            break
        time.sleep(POLL_S)
        if (counted := read()) != last:
            last, changed = counted, time.monotonic()
    return last
