# SPDX-License-Identifier: Apache-2.0
"""Judges a step's output for benchmarks.attention_suite: how far off it is, and whether that is wrong."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import SparseWork
from benchmarks.batches import Batch
from benchmarks.exact import Exact
from minference_vllm.config import MInferenceConfig

TOLERANCE = 1e-2
"""Absolute and relative, as in vLLM's tests."""

FP8_TOLERANCE = 2e-2
"""The same for sparse rows over a cache in FP8, where a GPU multiplies queries and keys in FP8. Hopper adds such
products to about 14 bits only (DeepSeek-V3, arXiv 2412.19437, section 3.3.2), which shows most with heads of 256."""

DENSE_FP8_TOLERANCE = 5e-2
"""The same for rows that FlashAttention-3 computes over a cache in FP8, compared with its own output for the whole
batch. It rounds probabilities to FP8, and at which point depends on how it splits the keys, and so on the batch."""

RECALL_TOLERANCE = 1e-3

DENSITY_TOLERANCE = 1e-4
"""By how much density may be below 1 where every key must be kept: `block` drops groups below 2^-26 of a row's
attention."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One step's output, and what it should be.

    Attributes:
        batch: the step's requests.
        config: the plugin's settings.
        keeps_all: whether sparse attention must keep every key under these settings.
        out: [num_rows, num_qo_heads, head_dim], the plugin's output.
        exact: exact attention.
        dense: the output of vLLM's backend for the same step; None if it was not run.
        trusts_dense: whether rows that run dense are compared with `dense` instead of `exact`, as over a cache in FP8.
        work: what the plugin has counted for the step.
        lse: [num_qo_heads, >= rows], log-sum-exp of the last sparse chunk, as attending left it; unused without one.
    """

    batch: Batch
    config: MInferenceConfig
    keeps_all: bool
    out: torch.Tensor
    exact: Exact
    dense: torch.Tensor | None
    trusts_dense: bool
    work: SparseWork
    lse: torch.Tensor

    @property
    def chunks(self) -> list[slice]:
        """Rows of each request that the gate lets through."""
        goes = self.batch.passes(self.config.min_seq_len, self.config.min_chunk)
        return [rows for (_, rows), is_sparse in zip(self.batch.spans(), goes, strict=True) if is_sparse]

    @property
    def chunk_lse(self) -> torch.Tensor:
        """[rows, num_qo_heads]: log-sum-exp over kept keys of the rows of the last sparse chunk."""
        last = self.chunks[-1]
        return self.lse[:, : last.stop - last.start].T

    @property
    def recall(self) -> float | None:
        """Mean recall of all rows of the last sparse chunk, after the guard acted."""
        if not self.chunks:
            return None
        return float((self.chunk_lse - self.exact.lse[self.chunks[-1]]).exp().mean())

    def row(self) -> dict[str, Any]:
        """Fields of a result's row."""
        faults = [*self._faults_of_work(), *self._faults_of_output()]
        exact = self.exact.out
        found = {
            "sparse_rows": self.work.sparse_tokens, "density": self.work.density, "redone": self.work.redone,
            "recall": self.recall,
            "max_abs": largest(self.out, exact), "max_rel": largest_relative(self.out, exact),
            "dense_max_abs": largest(self.dense, exact), "dense_max_rel": largest_relative(self.dense, exact),
            "max_from_dense": largest(self.out, self.dense),
        }  # fmt: skip
        shown = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in found.items()}
        # JSON has no NaN; a NaN is reported in `fault`.
        shown = {name: value if value is None or math.isfinite(value) else None for name, value in shown.items()}
        return {**shown, "ok": not faults, "fault": "; ".join(faults) or None}

    def _faults_of_work(self) -> Iterator[str]:
        """Whether the rows that ran sparse are those that should have, and whether enough was kept."""
        wanted = sum(rows.stop - rows.start for rows in self.chunks)
        if self.work.sparse_tokens != wanted:
            yield f"{self.work.sparse_tokens} rows ran sparse, not {wanted}"
        elif wanted:
            density, recall = self.work.density or 0.0, self.recall or 0.0
            floor = 1 - RECALL_TOLERANCE if self.keeps_all else self.config.recall_floor
            if self.keeps_all and not 1 - DENSITY_TOLERANCE <= density <= 1:
                yield f"density is {density:.6g}, where every pair is to be kept"
            if not density > 0:
                yield "no pair was kept"
            if not floor <= recall <= 1 + RECALL_TOLERANCE:
                yield f"recall is {recall:.6g}, not from {floor:.4g} to 1"

    def _faults_of_output(self) -> Iterator[str]:
        expected, allowed = self._bounds()
        # A NaN is never within bounds.
        wrong = ~((self.out.float() - expected).abs() <= allowed)
        if wrong.any():
            row, head, _ = wrong.nonzero()[0].tolist()
            yield f"{int(wrong.sum())} of {wrong.numel()} numbers are off, the first in row {row} of head {head}"

    def _bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What each number should be, and by how much it may differ."""
        expected = self.exact.out.clone()
        is_fp8 = self.trusts_dense and self.dense is not None
        allowed = (FP8_TOLERANCE if is_fp8 else TOLERANCE) * (1 + expected.abs())
        if is_fp8:
            is_dense = torch.ones(len(self.out), dtype=torch.bool, device=self.out.device)
            for rows in self.chunks:
                is_dense[rows] = False
            expected[is_dense] = self.dense[is_dense].float()
            allowed[is_dense] = DENSE_FP8_TOLERANCE * (1 + expected[is_dense].abs())
        if self.chunks and not self.keeps_all:
            allowed[self.chunks[-1]] += self.exact.moved(self.chunk_lse, self.chunks[-1])
        return expected, allowed


def largest(out: torch.Tensor | None, expected: torch.Tensor | None) -> float | None:
    """Largest difference between two numbers at the same place; None if either tensor is missing."""
    return None if out is None or expected is None else float((out.float() - expected.float()).abs().max())


def largest_relative(out: torch.Tensor | None, expected: torch.Tensor) -> float | None:
    """Largest norm of the difference between two rows of a head, as a share of the expected row's norm."""
    return None if out is None else float(((out.float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
