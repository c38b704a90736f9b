# SPDX-License-Identifier: Apache-2.0
"""What measuring recall and attending for listed heads must give, wherever they run."""

import torch

from minference_vllm import ops
from minference_vllm.attention import prefill
from minference_vllm.chunk import Chunk
from minference_vllm.index import HeadIndex
from minference_vllm.ops import Kernel
from minference_vllm.recall import Floors
from minference_vllm.reference.dense import dense
from minference_vllm.scratch import AttendBuffers, RecallBuffers, RecallTotals
from tests.kernels.cases import Case, make_chunk, make_state
from tests.kernels.checks import adds_fp8, assert_close

FLOORS, LAYER, NUM_LAYERS = Floors(0.6, 0.0), 1, 3


def measure(
    kernel: Kernel, chunk: Chunk, lse: torch.Tensor, floors: Floors = FLOORS
) -> tuple[RecallBuffers, RecallTotals]:
    buffers = RecallBuffers.allocate(chunk.num_qo_heads, chunk.q.device)
    for left_over in (buffers.partial_max, buffers.partial_sum, buffers.recall, buffers.heads, buffers.num_heads):
        left_over.fill_(7)
    totals = RecallTotals.allocate(NUM_LAYERS, chunk.num_qo_heads, chunk.q.device)
    ops.measure_recall(chunk, lse, floors, LAYER, buffers, totals, kernel)
    ops.measure_recall(chunk, lse, floors, LAYER, buffers, totals, kernel)  # totals add up
    return buffers, totals


def attended(case: Case, device: torch.device) -> tuple[Chunk, torch.Tensor]:
    """A chunk in which each head keeps a different part of the keys, and the log-sum-exps over those keys."""
    chunk = make_chunk(case, device)
    method = case.vertical_slash(Kernel.REFERENCE)
    state = make_state(case, method, device)
    prefill(chunk, method, state)
    return chunk, state.attend.lse


def check_recall(kernel: Kernel, case: Case, device: torch.device) -> None:
    chunk, lse = attended(case, device)
    (want, want_totals), (got, totals) = (measure(which, chunk, lse) for which in (Kernel.REFERENCE, kernel))
    torch.testing.assert_close(got.recall, want.recall, rtol=2e-3, atol=2e-3)
    below = sorted(got.heads[: int(got.num_heads)].tolist())
    assert below == (got.recall < FLOORS.head).nonzero().flatten().tolist()
    assert totals.histogram.sum() == want_totals.histogram.sum() == 2 * case.num_qo_heads
    assert totals.chunks.tolist() == [0, 2, 0]
    assert totals.redone.tolist() == [0, 2 * len(below), 0]
    torch.testing.assert_close(totals.sums[LAYER], 2 * got.recall.double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(totals.worst[LAYER], got.recall.double(), rtol=1e-6, atol=0)
    assert (totals.worst[[0, 2]] == 1).all()
    assert (totals.sums[[0, 2]] == 0).all()


def check_heads(kernel: Kernel, case: Case, device: torch.device) -> None:
    whole = make_chunk(case, device)
    dense(whole.q, whole.kv, case.context_len, case.scale, whole.out, whole.q_scale, whole.sinks)
    everyone = list(range(case.num_qo_heads))
    for listed in ([], everyone[::-1], everyone[-1:], everyone[1::2]):
        chunk = make_chunk(case, device)
        heads = torch.full((case.num_qo_heads,), 2**30, dtype=torch.int32, device=device)
        heads[: len(listed)] = torch.tensor(listed, dtype=torch.int32)
        num_heads = torch.tensor([len(listed)], dtype=torch.int32, device=device)
        buffers = AttendBuffers.allocate(case.num_qo_heads, case.num_rows + 5, device)
        buffers.lse.fill_(torch.nan)
        ops.attend(chunk, HeadIndex(heads, num_heads), buffers, kernel)
        others = [head for head in everyone if head not in listed]
        if listed:
            assert_close(chunk.out[:, sorted(listed)], whole.out[:, sorted(listed)], adds_fp8(chunk))
        assert buffers.lse[listed, : case.num_rows].isfinite().all()
        assert buffers.lse[others].isnan().all()
        assert chunk.out[:, others].isnan().all()
        assert buffers.kept_pairs.item() == len(listed) * chunk.causal_pairs
        assert buffers.tile_counter.item() == 0
