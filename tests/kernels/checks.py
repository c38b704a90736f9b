# SPDX-License-Identifier: Apache-2.0
"""What every attending kernel must give, wherever it runs."""

from collections.abc import Callable
from dataclasses import replace

import torch

from minference_vllm import ops, reference
from minference_vllm.chunk import FP8, Chunk
from minference_vllm.index import SparseIndex
from minference_vllm.ops import Kernel
from minference_vllm.scratch import MASS_UNIT, AttendBuffers, ProbeBuffers
from tests.kernels.cases import Case, make_chunk, make_state


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def adds_fp8(chunk: Chunk) -> bool:
    """Whether scores are sums of FP8 products on the tensor cores, which keep some 14 bits of a sum."""
    return chunk.q.dtype == FP8 and chunk.q.is_cuda


def assert_close(actual: torch.Tensor, expected: torch.Tensor, has_fp8_scores: bool = False) -> None:
    """Outputs, [rows, heads, head_dim], agree as a whole, and so does each row of each head, because one wrong row
    would be lost in the norm of all. Outputs and probabilities are each rounded once to the cache's dtype, by 2^-8 or
    2^-11. Scores of up to 16 whose sums keep 14 bits move probabilities by up to 2^-10.
    """
    tolerance = 8e-3 if actual.dtype == torch.bfloat16 else 2e-3 + has_fp8_scores * 2e-3
    assert relative_error(actual, expected) < tolerance
    error, size = (actual.float() - expected.float()).norm(dim=-1), expected.float().norm(dim=-1)
    # Where values cancel, a row is smaller than the values whose rounding errors it contains.
    assert (error <= 4 * tolerance * size.clamp_min(size.mean())).all()


Attend = Callable[[Chunk, SparseIndex, AttendBuffers], None]


def check_attend(attend: Attend, chunk: Chunk, index: SparseIndex) -> None:
    """The result is the reference's. Every row of the chunk is written, and nothing past its rows."""
    q, num_rows = chunk.q, chunk.num_rows
    results = []
    for function in (reference.attend, attend):
        out = torch.full((num_rows + 1, *q.shape[1:]), torch.nan, dtype=chunk.out.dtype, device=q.device)
        buffers = AttendBuffers.allocate(chunk.num_qo_heads, num_rows + 5, q.device)
        buffers.lse.fill_(torch.nan)
        function(replace(chunk, out=out[:-1]), index, buffers)
        results.append((out, buffers))
    (expected, of_reference), (out, buffers) = results
    assert_close(out[:-1], expected[:-1], adds_fp8(chunk))
    assert out[-1].isnan().all()
    torch.testing.assert_close(buffers.lse, of_reference.lse, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert buffers.lse[:, :num_rows].isfinite().all()
    assert buffers.kept_pairs.item() == of_reference.kept_pairs.item()
    assert buffers.tile_counter.item() == 0, "the next launch would count on from there"


def attend_with(kernel: Kernel) -> Attend:
    return lambda chunk, index, buffers: ops.attend(chunk, index, buffers, kernel)


def check_bands(case: Case, kernel: Kernel, device: torch.device) -> None:
    """Attention to what vertical_slash chooses is the reference's."""
    chunk, method = make_chunk(case, device), case.vertical_slash(Kernel.REFERENCE)
    state = make_state(case, method, device)
    check_attend(attend_with(kernel), chunk, method.choose(chunk, state.budgets, state.buffers))


def check_probe(case: Case, device: torch.device, kernel: Kernel = Kernel.TRITON) -> None:
    """The masses of columns and of diagonals are the reference's."""
    chunk, counts = make_chunk(case, device), case.vertical_slash(Kernel.TRITON).settings.probe_counts
    results = []
    for which in (Kernel.REFERENCE, kernel):
        buffers = ProbeBuffers.allocate(case.num_qo_heads, sum(counts), case.shape.max_seq_len, device)
        buffers.slash.fill_(7)  # left over from another request
        ops.probe(chunk, *counts, buffers, which)
        results.append(buffers)
    expected, actual = results
    # On tensor cores a float32 product keeps ten bits of its operands.
    has_fp8_scores = adds_fp8(chunk)
    tolerance = 2e-2 if case.dtype == torch.float32 else 5e-3 if has_fp8_scores else 1e-4
    torch.testing.assert_close(actual.lse, expected.lse, rtol=tolerance, atol=tolerance)
    present = expected.lse.isfinite().sum(1)
    for name in ("vertical", "slash"):
        mass, want = getattr(actual, name)[:, : case.seq_len], getattr(expected, name)[:, : case.seq_len]
        # Every probe row's mass is 1, up to half a unit of rounding for each of its entries.
        total = mass.sum(1) * MASS_UNIT
        torch.testing.assert_close(total, present.to(total), rtol=1e-2, atol=0)
        assert relative_error(mass, want) < (2e-2 if case.dtype == torch.float32 or has_fp8_scores else 2e-3)
