# SPDX-License-Identifier: Apache-2.0
"""A step of which some rows run sparse: the metadata builder makes it, and the attention layers read it."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from minference_vllm.plan import DenseRun, Plan, SparseChunk
from minference_vllm.record import StepRecord


@dataclass(frozen=True, slots=True)
class Step:
    """The attribute `minference` of vLLM's metadata; the metadata of a step that runs dense has none.

    Attributes:
        chunks: the requests' rows that run sparse; empty if a fault has made all rows dense.
        dense_runs: the other rows, in runs of neighbouring requests, each with metadata that describes it as a batch of
            its own.
        record: what is counted once all layers have run.
    """

    chunks: tuple[SparseChunk, ...]
    dense_runs: tuple[tuple[DenseRun, Any], ...]
    record: StepRecord

    @classmethod
    def of(cls, plan: Plan, record: StepRecord, metadata: Any) -> "Step":
        """The step of a plan on FlashAttention's metadata of the whole batch."""
        return cls(plan.chunks, tuple((run, run_metadata(run, metadata)) for run in plan.dense_runs), record)

    def on(self, metadata: Any) -> "Step":
        """The same step on the metadata of another KV cache group."""
        runs = tuple((run, run_metadata(run, metadata)) for run, _ in self.dense_runs)
        return dataclasses.replace(self, dense_runs=runs)

    def all_dense(self, metadata: Any) -> "Step":
        """The same step with nothing sparse in it, on the metadata of another KV cache group."""
        end = metadata.num_actual_tokens
        run = DenseRun(0, len(metadata.seq_lens), 0, end, metadata.max_query_len, metadata.max_seq_len)
        return dataclasses.replace(self, chunks=(), dense_runs=((run, metadata),))


def run_metadata(run: DenseRun, metadata: Any) -> Any:
    """FlashAttention's metadata of a run of dense requests, as a batch of their own."""
    return dataclasses.replace(
        metadata,
        num_actual_tokens=run.query_end - run.query_start,
        max_query_len=run.max_query_len,
        query_start_loc=metadata.query_start_loc[run.first : run.end + 1] - run.query_start,
        max_seq_len=run.max_seq_len,
        seq_lens=metadata.seq_lens[run.first : run.end],
        block_table=metadata.block_table[run.first : run.end],
        slot_mapping=metadata.slot_mapping[run.query_start : run.query_end],
        # FlashAttention-3's schedule was made for the whole batch, and does not fit a part of it.
        scheduler_metadata=None,
        max_num_splits=0,
    )
