# SPDX-License-Identifier: Apache-2.0
"""What every attending kernel must give, wherever it runs."""

from collections.abc import Callable

import torch

from minference_vllm.index import PagedKV, SparseIndex
from tests.kernels.cases import Case
from tests.kernels.engines import REFERENCE


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Outputs agree. They and their probabilities are rounded to the cache's dtype once each: 2^-8 or 2^-11."""
    assert relative_error(actual, expected) < (8e-3 if actual.dtype == torch.bfloat16 else 2e-3)


def check_attend(attend: Callable[..., None], case: Case, index: SparseIndex, q: torch.Tensor, kv: PagedKV) -> None:
    """Against the reference. Every row of the chunk is written, and nothing past them."""
    results = []
    for function in (REFERENCE.attend, attend):
        out = torch.full((case.num_rows + 1, *q.shape[1:]), torch.nan, dtype=q.dtype, device=q.device)
        lse = torch.full((case.num_qo_heads, case.num_rows + 5), torch.nan, device=q.device)
        pairs = torch.zeros(1, dtype=torch.int64, device=q.device)
        function(q, kv, case.context_len, case.scale, index, out[:-1], lse, pairs)
        results.append((out, lse, pairs))
    (expected, expected_lse, expected_pairs), (out, lse, pairs) = results
    assert_close(out[:-1], expected[:-1])
    assert out[-1].isnan().all()
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert lse[:, : case.num_rows].isfinite().all()
    assert pairs.item() == expected_pairs.item()
