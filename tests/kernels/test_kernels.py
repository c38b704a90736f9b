# SPDX-License-Identifier: Apache-2.0
"""Each kernel against its plain-torch twin."""

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from minference_vllm import ops, reference
from minference_vllm.attention import prefill
from minference_vllm.index import BAND, BANDS_PER_TILE, HALF, HALVES, TILE, BandIndex
from minference_vllm.kernels import cuda, triton
from minference_vllm.methods import Method
from minference_vllm.ops import Kernel
from minference_vllm.reference.attend import kept_before
from minference_vllm.scratch import SelectBuffers
from tests.kernels.cases import (
    CASES,
    GPU_CASES,
    Case,
    make_chunk,
    make_rising_cache,
    make_state,
)
from tests.kernels.checks import attend_with, check_attend, check_bands, check_probe
from tests.kernels.indexes import Kept, index_of

every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name) for case in CASES]
    + [pytest.param(case, id=case.name, marks=pytest.mark.gpu) for case in GPU_CASES],
)


every_kernel = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(Kernel.TRITON, id="triton"),
        pytest.param(Kernel.CUDA, id="cuda", marks=[pytest.mark.gpu, pytest.mark.hopper]),
    ],
)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_the_cuda_library_takes_what_it_promises(case: Case) -> None:
    chunk = make_chunk(case, torch.device("cpu"))
    promised = case.head_dim in cuda.library.SUPPORTED_HEAD_DIMS and case.dtype != torch.float32
    assert cuda.attend.supports(chunk) is promised
    assert cuda.probe.supports(chunk, 64, 0) is promised
    assert not cuda.probe.supports(chunk, 32, 0)


@every_case
def test_probe_sums_the_mass_of_columns_and_diagonals(case: Case, device: torch.device) -> None:
    check_probe(case, device)


@pytest.mark.parametrize(
    ("length", "keep", "forced"),
    [(1, 1, 0), (1, 1, 1), (63, 63, 5), (500, 100, 30), (4097, 4096, 0), (5000, 1, 100), (70_001, 777, 100)],
)
@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros", "extremes"])
@pytest.mark.parametrize("grain", [BAND, TILE])
def test_select_keeps_exactly_what_a_stable_sort_keeps(
    length: int, keep: int, forced: int, kind: str, grain: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(length + keep)
    mass = {
        "distinct": torch.randperm(3 * (length + 50), generator=generator).view(3, -1) * 1000,
        "ties": torch.randint(0, 4, (3, length + 50), generator=generator),
        "zeros": torch.zeros(3, length + 50),
        "extremes": torch.randint(0, 2**30 + 1, (3, length + 50), generator=generator),
    }[kind].to(device, torch.int32)
    buffers = SelectBuffers.allocate(3, device)
    # Each head has its own number of entries to keep: the one of this test, one, and more than there is room for. How
    # many first entries it always keeps is its own too. Both are columns of one tensor, as a method's budgets are.
    given = torch.tensor([[keep, forced], [1, 0], [2 * length, forced + 7]], dtype=torch.int32, device=device)
    keeps, firsts = given.unbind(1)
    results = []
    for select in (reference.select, triton.select):
        indptr = torch.full((3, -(-length // grain) + 3), -5, dtype=torch.int32, device=device)
        out = torch.full((3, keep + 4), -5, dtype=torch.int32, device=device)
        select(mass, length, keeps, firsts, indptr, grain, out, buffers)
        results.append((indptr, out))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    kept = results[0][0][:, -1].tolist()
    assert kept == [keep, 1, min(length, keep + 4)]
    for (size, first), entries in zip(given.tolist(), results[0][1].tolist(), strict=True):
        always = min(first, size, keep + 4, length)
        assert entries[:always] == [*range(always)]


def test_select_refuses_marks_that_do_not_reach_all_entries() -> None:
    mass, indptr = torch.zeros(1, 40, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="2 marks of 16 reach"):
        none = indptr[:, 0]
        ops.select(mass, 40, none, none, indptr, 16, None, SelectBuffers.allocate(1, mass.device), Kernel.TRITON)


def kept_diagonals(num_bands: int, kept: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Three heads' kept diagonals, repeats allowed: [3, kept] distances, ascending, and slash_indptr of them."""
    generator = torch.Generator().manual_seed(kept)
    distances = torch.randint(0, (num_bands + BANDS_PER_TILE) * BAND, (3, kept), generator=generator).sort(1).values
    edges = torch.arange(num_bands + BANDS_PER_TILE + 1).mul(BAND).expand(3, -1).contiguous()
    return distances, torch.searchsorted(distances, edges).to(device, torch.int32)


def band_buffers(num_bands: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bands, bands_indptr and band_halves for three heads, cut out of larger ones and full of garbage."""
    return (
        torch.full((3, 3, num_bands + 3), -5, dtype=torch.int32, device=device),
        torch.full((3, 3, num_bands // BANDS_PER_TILE + 4), -5, dtype=torch.int32, device=device)[..., :-3],
        torch.full((3, num_bands + 4), 77, dtype=torch.uint8, device=device),
    )


@pytest.mark.parametrize("num_bands", [0, 8, 16, 2040, 2048, 4104])
@pytest.mark.parametrize("kept", [0, 1, 100, 5000])
def test_band_lists_agree(num_bands: int, kept: int, device: torch.device) -> None:
    _, slash_indptr = kept_diagonals(num_bands, kept, device)
    results = []
    for band_lists in (reference.band_lists, triton.band_lists):
        buffers = band_buffers(num_bands, device)
        band_lists(slash_indptr, num_bands, *buffers)
        # What lies past bands_indptr belongs to another tile and must stay as it was.
        results.append((*buffers, buffers[1]._base))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("kept", [0, 1, 20, 400])
def test_a_half_keeps_the_bands_of_its_own_rows(kept: int, device: torch.device) -> None:
    last_tile = 4
    num_bands = last_tile * BANDS_PER_TILE
    distances, slash_indptr = kept_diagonals(num_bands, kept, device)
    bands, bands_indptr, band_halves = band_buffers(num_bands, device)
    reference.band_lists(slash_indptr, num_bands, bands, bands_indptr, band_halves)
    no_columns = torch.zeros(3, last_tile + 1, dtype=torch.int32, device=device)
    index = BandIndex(bands, bands_indptr, band_halves, no_columns, no_columns)
    for head, tile, half in itertools.product(range(3), range(last_tile + 1), range(HALVES)):
        start = tile * TILE
        rows = torch.arange(start + half * HALF, start + half * HALF + HALF)
        # [HALF, kept]
        needed = rows[:, None] - distances[head]
        keys = kept_before(index, head, tile, half).cpu()
        assert torch.isin(needed[(needed >= 0) & (needed < start)], keys).all()
        # One band of slack, since slash_indptr distinguishes diagonals only by multiples of BAND.
        for first in keys[keys % BAND == 0].tolist():
            assert ((needed > first - BAND) & (needed < first + 2 * BAND)).any()


@every_case
@every_kernel
def test_attend_matches_the_reference(case: Case, kernel: Kernel, device: torch.device) -> None:
    check_bands(case, kernel, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@every_kernel
def test_attend_follows_scores_that_rise(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> None:
    case = Case("", num_rows=200, context_len=1100, num_qo_heads=2, num_kv_heads=1, head_dim=128, dtype=dtype)
    chunk = replace(make_chunk(case, device), kv=make_rising_cache(case, device))
    index = index_of([Kept(list(range(1, 70)), [], [71, 73], [0, 30, 64])] * 2, case, device)
    check_attend(attend_with(kernel), chunk, index)


@pytest.mark.parametrize(
    "case",
    [pytest.param(Case("", num_rows=150, context_len=140, num_qo_heads=2, num_kv_heads=1, page_size=32), id="small")]
    + [pytest.param(case, id=case.name, marks=pytest.mark.gpu) for case in GPU_CASES],
)
@every_kernel
@pytest.mark.parametrize("make_method", [Case.vertical_slash, Case.block])
def test_sparse_prefill_repeats_bit_for_bit(
    case: Case, kernel: Kernel, make_method: Callable[[Case, Kernel], Method], device: torch.device
) -> None:
    method = make_method(case, kernel)
    state = make_state(case, method, device)
    outs = []
    for _ in range(10 if device.type == "cuda" else 3):
        chunk = make_chunk(case, device)
        prefill(chunk, method, state)
        outs.append(chunk.out)
    assert outs[0].isfinite().all()
    assert all(torch.equal(outs[0], out) for out in outs[1:])
