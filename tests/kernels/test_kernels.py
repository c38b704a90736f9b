# SPDX-License-Identifier: Apache-2.0
"""Each kernel against its plain-torch twin."""

import itertools

import pytest
import torch

from minference_vllm.attention import sparse_prefill
from minference_vllm.engine import Engine
from minference_vllm.estimators import ESTIMATORS
from minference_vllm.index import BAND, BANDS_PER_TILE, HALF, HALVES, TILE, SparseIndex
from minference_vllm.reference.attend import kept_before
from minference_vllm.workspace import MASS_UNIT
from tests.kernels.cases import (
    CASES,
    GPU_CASES,
    Case,
    make_cache,
    make_queries,
    make_rising_cache,
    make_workspace,
)
from tests.kernels.checks import check_attend, relative_error
from tests.kernels.engines import CUDA, REFERENCE, TRITON
from tests.kernels.indexes import Kept, index_of

every_case = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name) for case in CASES]
    + [pytest.param(case, id=case.name, marks=pytest.mark.gpu) for case in GPU_CASES],
)


every_engine = pytest.mark.parametrize(
    "engine",
    [
        pytest.param(TRITON, id="triton"),
        pytest.param(CUDA, id="cuda", marks=[pytest.mark.gpu, pytest.mark.hopper]),
    ],
)


@every_case
def test_probe_sums_the_mass_of_columns_and_diagonals(case: Case, device: torch.device) -> None:
    q, kv, config = make_queries(case, device), make_cache(case, device), case.config()
    num_last, num_spread = config.probe_counts
    results = []
    for engine in (REFERENCE, TRITON):
        ws = make_workspace(case, config, device)
        ws.slash.fill_(7)  # left over from another request
        engine.probe(q, kv, case.context_len, case.scale, num_last, num_spread, ws)
        results.append(ws)
    expected, actual = results
    # A float32 product on the matrix units keeps ten bits of its operands.
    tolerance = 2e-2 if case.dtype == torch.float32 else 1e-4
    torch.testing.assert_close(actual.probe_lse, expected.probe_lse, rtol=tolerance, atol=tolerance)
    present = expected.probe_lse.isfinite().sum(1)
    for name in ("vertical", "slash"):
        mass, want = getattr(actual, name)[:, : case.seq_len], getattr(expected, name)[:, : case.seq_len]
        # Every probe row's mass is 1; half a unit of rounding for each of its entries.
        total = mass.sum(1) * MASS_UNIT
        torch.testing.assert_close(total, present.to(total), rtol=1e-2, atol=0)
        assert relative_error(mass, want) < (2e-2 if case.dtype == torch.float32 else 2e-3)


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
    case = Case("", num_qo_heads=3)
    ws = make_workspace(case, case.config(), device)
    results = []
    for engine in (REFERENCE, TRITON):
        below = torch.full((3, -(-length // grain) + 3), -5, dtype=torch.int32, device=device)
        out = torch.full((3, keep + 4), -5, dtype=torch.int32, device=device)
        engine.select(mass, length, keep, forced, below, grain, out, ws)
        results.append((below, out))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def kept_diagonals(num_bands: int, kept: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Three heads' kept diagonals, repeats allowed: [3, kept] distances, ascending, and slash_below of them."""
    generator = torch.Generator().manual_seed(kept)
    distances = torch.randint(0, (num_bands + BANDS_PER_TILE) * BAND, (3, kept), generator=generator).sort(1).values
    edges = torch.arange(num_bands + BANDS_PER_TILE + 1).mul(BAND).expand(3, -1).contiguous()
    return distances, torch.searchsorted(distances, edges).to(device, torch.int32)


def band_buffers(num_bands: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bands, bands_below and band_halves for three heads, cut out of larger ones and full of garbage."""
    return (
        torch.full((3, 3, num_bands + 3), -5, dtype=torch.int32, device=device),
        torch.full((3, 3, num_bands // BANDS_PER_TILE + 4), -5, dtype=torch.int32, device=device)[..., :-3],
        torch.full((3, num_bands + 4), 77, dtype=torch.uint8, device=device),
    )


@pytest.mark.parametrize("num_bands", [0, 8, 16, 2040, 2048, 4104])
@pytest.mark.parametrize("kept", [0, 1, 100, 5000])
def test_band_lists_agree(num_bands: int, kept: int, device: torch.device) -> None:
    _, slash_below = kept_diagonals(num_bands, kept, device)
    results = []
    for engine in (REFERENCE, TRITON):
        buffers = band_buffers(num_bands, device)
        engine.band_lists(slash_below, num_bands, *buffers)
        # What lies past bands_below is another tile's and stays as it was.
        results.append((*buffers, buffers[1]._base))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("kept", [0, 1, 20, 400])
def test_a_half_keeps_the_bands_of_its_own_rows(kept: int, device: torch.device) -> None:
    last_tile = 4
    num_bands = last_tile * BANDS_PER_TILE
    distances, slash_below = kept_diagonals(num_bands, kept, device)
    bands, bands_below, band_halves = band_buffers(num_bands, device)
    REFERENCE.band_lists(slash_below, num_bands, bands, bands_below, band_halves)
    no_columns = torch.zeros(3, last_tile + 1, dtype=torch.int32, device=device)
    index = SparseIndex(bands, bands_below, band_halves, no_columns, no_columns)
    for head, tile, half in itertools.product(range(3), range(last_tile + 1), range(HALVES)):
        start = tile * TILE
        rows = torch.arange(start + half * HALF, start + half * HALF + HALF)
        # [HALF, kept]
        needed = rows[:, None] - distances[head]
        keys = kept_before(index, head, tile, half).cpu()
        assert torch.isin(needed[(needed >= 0) & (needed < start)], keys).all()
        # A band of slack, since slash_below tells diagonals apart by BAND.
        for first in keys[keys % BAND == 0].tolist():
            assert ((needed > first - BAND) & (needed < first + 2 * BAND)).any()


@every_case
@every_engine
def test_attend_matches_the_reference(case: Case, engine: Engine, device: torch.device) -> None:
    q, kv, config = make_queries(case, device), make_cache(case, device), case.config()
    ws = make_workspace(case, config, device)
    index = ESTIMATORS["vertical_slash"](q, kv, case.context_len, case.scale, config, REFERENCE, ws)
    check_attend(engine.attend, case, index, q, kv)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@every_engine
def test_attend_follows_scores_that_rise(engine: Engine, dtype: torch.dtype, device: torch.device) -> None:
    case = Case("", num_rows=200, context_len=1100, num_qo_heads=2, num_kv_heads=1, head_dim=128, dtype=dtype)
    q, kv = make_queries(case, device), make_rising_cache(case, device)
    index = index_of([Kept(list(range(1, 70)), [], [71, 73], [0, 30, 64])] * 2, case, device)
    check_attend(engine.attend, case, index, q, kv)


@pytest.mark.parametrize(
    "case",
    [pytest.param(Case("", num_rows=150, context_len=140, num_qo_heads=2, num_kv_heads=1, page_size=32), id="small")]
    + [pytest.param(case, id=case.name, marks=pytest.mark.gpu) for case in GPU_CASES],
)
@every_engine
def test_sparse_prefill_repeats_bit_for_bit(case: Case, engine: Engine, device: torch.device) -> None:
    q, kv, config = make_queries(case, device), make_cache(case, device), case.config()
    ws = make_workspace(case, config, device)
    outs = []
    for _ in range(10):
        out = torch.full_like(q, torch.nan)
        sparse_prefill(q, kv, case.context_len, case.scale, config, engine, ws, out)
        outs.append(out)
    assert outs[0].isfinite().all()
    assert all(torch.equal(outs[0], out) for out in outs[1:])
