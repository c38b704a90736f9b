# SPDX-License-Identifier: Apache-2.0
"""Means of keys, by the kernel and by its plain-torch twin."""

from collections.abc import Callable

import pytest
import torch

from minference_vllm import ops, reference
from minference_vllm.boxes import BOX_MEAN
from minference_vllm.chunk import PagedKV
from minference_vllm.index import GROUP
from minference_vllm.kernels import triton
from minference_vllm.kernels.triton import means as means_kernels
from minference_vllm.methods import MAX_TOKENS
from minference_vllm.ops import Kernel
from minference_vllm.plan import SUPPORTED_HEAD_DIMS
from minference_vllm.reference.pages import gather
from minference_vllm.scratch import CENTRE_END, CENTRE_START, FP8, MEAN
from tests.kernels.blocks import BF16, engines, every_case, make_lse, make_masses, score_dtypes
from tests.kernels.cases import Case, make_cache, make_chunk


@every_case
def test_means_of_keys(case: Case, device: torch.device) -> None:
    kv, count = make_cache(case, device), case.seq_len // MEAN
    results = []
    for key_means in (reference.key_means, triton.key_means):
        means = torch.full((case.num_kv_heads, count + 3, case.head_dim), 7.0).to(device, case.dtype)
        key_means(kv, case.seq_len, means)
        results.append(means)
    expected, actual = results
    torch.testing.assert_close(actual, expected, rtol=1e-2 if case.dtype == BF16 else 2e-3, atol=1e-3)
    assert (actual[:, count:] == 7).all()
    keys, _ = gather(kv, case.seq_len)
    centre = keys[:, CENTRE_START:CENTRE_END].float().mean(1) if case.seq_len >= CENTRE_END else 0
    for j in range(0, count, 13):
        mean = keys[:, j * MEAN : (j + 1) * MEAN].float().mean(1) - centre
        torch.testing.assert_close(actual[:, j].float(), mean, rtol=1e-2, atol=1e-2)


@engines
@score_dtypes
def test_a_vector_that_all_keys_share_changes_no_mass(kernel: Kernel, is_fp8: bool, device: torch.device) -> None:
    """Biases of keys are large in some models, and would drown in rounding what tells keys apart."""
    case = Case("", num_rows=256, context_len=512, num_qo_heads=2, num_kv_heads=1, head_dim=128)
    chunk, masses = make_chunk(case, device), []
    chunk.kv.k.copy_((chunk.kv.k * 8).round() / 8)  # exact in fp16 with the bias too
    for bias in (0, 64):
        chunk.kv.k[..., ::40] += bias
        means = torch.empty(1, case.seq_len // MEAN, 128, device=device, dtype=FP8 if is_fp8 else case.dtype)
        lse, codes = make_lse(chunk), make_masses(chunk, 2)
        ops.key_means(chunk.kv, case.seq_len, means, kernel)
        ops.row_normalisers(chunk, means, lse, kernel)
        ops.group_masses(chunk, means, lse, codes, kernel)
        masses.append(codes[:, :, : case.context_len // GROUP].int())
    assert torch.equal(*masses)


@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_means_of_the_longest_prompts_are_no_more_programs_than_a_grid_takes(
    head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids: list[tuple[int, ...]] = []

    class Kernels:
        """Stands in for a kernel."""

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *_, **__: None

    for name in ("_means_kernel", "_coarse_means_kernel"):
        monkeypatch.setattr(means_kernels, name, Kernels())
    fine, coarse = (torch.empty(8, MAX_TOKENS // mean, head_dim, device="meta") for mean in (MEAN, BOX_MEAN))
    cache = torch.empty(1, 8, 16, 2 * head_dim, device="meta")
    table = torch.empty(1, MAX_TOKENS // 16, dtype=torch.int32, device="meta")
    triton.key_means(PagedKV(*cache.split(head_dim, dim=-1), table, 0), MAX_TOKENS, fine)
    triton.coarse_means(fine, MAX_TOKENS, coarse, MEAN, BOX_MEAN)
    # CUDA's limit for the second and third axes of a grid.
    assert all(size < 2**16 for grid in grids for size in grid[1:])
    assert len(grids) == 2
