# SPDX-License-Identifier: Apache-2.0
"""What every attending kernel must give, wherever it runs."""

from collections.abc import Callable

import torch

from minference_vllm.index import PagedKV, SparseIndex
from minference_vllm.kernels.cuda.attend import supports
from minference_vllm.kernels.cuda.library import SUPPORTED_HEAD_DIMS
from tests.kernels.cases import Case
from tests.kernels.engines import CUDA, REFERENCE


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Outputs, [rows, heads, head_dim], agree, and so does each row of each head: one that is wrong would be lost in
    the norm of all. They and their probabilities are rounded to the cache's dtype once each: 2^-8 or 2^-11.
    """
    tolerance = 8e-3 if actual.dtype == torch.bfloat16 else 2e-3
    assert relative_error(actual, expected) < tolerance
    error, size = (actual.float() - expected.float()).norm(dim=-1), expected.float().norm(dim=-1)
    # Values that cancel leave a row smaller than what was rounded.
    assert (error <= 4 * tolerance * size.clamp_min(size.mean())).all()


def check_attend(attend: Callable[..., None], case: Case, index: SparseIndex, q: torch.Tensor, kv: PagedKV) -> None:
    """Against the reference. Every row of the chunk is written, and nothing past them."""
    results = []
    for function in (REFERENCE.attend, attend):
        out = torch.full((case.num_rows + 1, *q.shape[1:]), torch.nan, dtype=q.dtype, device=q.device)
        lse = torch.full((case.num_qo_heads, case.num_rows + 5), torch.nan, device=q.device)
        pairs = torch.zeros(1, dtype=torch.int64, device=q.device)
        if function is CUDA.attend:  # what its kernel does not take goes to Triton's
            promised = case.head_dim in SUPPORTED_HEAD_DIMS and case.dtype != torch.float32
            assert supports(q, kv, out[:-1]) is promised
        function(q, kv, case.context_len, case.scale, index, out[:-1], lse, pairs)
        results.append((out, lse, pairs))
    (expected, expected_lse, expected_pairs), (out, lse, pairs) = results
    assert_close(out[:-1], expected[:-1])
    assert out[-1].isnan().all()
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert lse[:, : case.num_rows].isfinite().all()
    assert pairs.item() == expected_pairs.item()
