# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels that attend and probe, over a cache in FP8, on the CPU: see test_emulated.py."""

from dataclasses import replace

import pytest
import torch

from minference_vllm.chunk import FP8
from minference_vllm.index import BandIndex, TileIndex
from minference_vllm.kernels.cuda.attend import attend, supports
from minference_vllm.ops import Kernel
from minference_vllm.scratch import AttendBuffers
from tests.kernels import test_emulated
from tests.kernels.breaks import ATTEND_BREAKS, FP8_BREAKS
from tests.kernels.cases import Case, make_chunk, make_rising_cache
from tests.kernels.checks import check_attend
from tests.kernels.emulated import Emulated, needs_interpreter
from tests.kernels.indexes import index_of, random_tile_index, tile_index_of, tiles_in_turn
from tests.kernels.recalls import check_heads, check_recall
from tests.kernels.test_emulated import CPU, HAND_WRITTEN, LATE, SEEDS, check_probe, chosen_index, one_thread

__all__ = ["one_thread"]  # a fixture
pytestmark = test_emulated.pytestmark


def in_fp8(case: Case, dtype: torch.dtype) -> Case:
    return replace(case, dtype=dtype, has_fp8_kv=True, has_fp8_q=True)


FP16, BF16 = torch.float16, torch.bfloat16
CASES = [
    in_fp8(Case("whole tiles", num_rows=256, context_len=640, num_qo_heads=2, head_dim=128, per_head=True), BF16),
    in_fp8(Case("page 48", num_rows=150, context_len=500, num_kv_heads=1, page_size=48, per_head=True), FP16),
    in_fp8(Case("page 128, HND", 129, 600, num_qo_heads=3, num_kv_heads=1, page_size=128, layout="HND"), BF16),
    in_fp8(Case("no context", num_rows=333, context_len=0, num_qo_heads=2, num_kv_heads=1, head_dim=128), FP16),
    in_fp8(Case("1 row", num_rows=1, context_len=699, num_qo_heads=8, num_kv_heads=1, head_dim=128), BF16),
    in_fp8(Case("group of seven", 70, 440, num_qo_heads=7, num_kv_heads=1, layout="HND", head_dim=128), BF16),
    in_fp8(Case("every column", 200, 300, num_qo_heads=2, num_kv_heads=1, vertical_size=10_000, slash_size=16), FP16),
]
every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
every_head_dim = pytest.mark.parametrize("head_dim", [64, 128])
LATE_FP8 = in_fp8(LATE, BF16)
BREAKS = {
    **FP8_BREAKS,
    "values are copied over others that are converted": ATTEND_BREAKS["keys are copied over others in use"],
}


def tiles(case: Case, seed: int) -> TileIndex:
    return tile_index_of(tiles_in_turn(seed), case, CPU)


def bands(case: Case) -> list[BandIndex]:
    return [index_of(heads, case, CPU) for heads in HAND_WRITTEN.values()]


@every_case
def test_attend_takes_any_tile_index(emulated: Emulated, case: Case) -> None:
    chunk, generator = make_chunk(case, CPU), torch.Generator().manual_seed(0)
    assert supports(chunk)
    for emulated.seed in range(SEEDS):
        check_attend(attend, chunk, tiles(case, emulated.seed))
        check_attend(attend, chunk, random_tile_index(case, generator, CPU))


@every_case
def test_attend_to_bands_and_columns(emulated: Emulated, case: Case) -> None:
    chunk = make_chunk(case, CPU)
    index = chosen_index(case, chunk)
    for emulated.seed in range(SEEDS):
        check_attend(attend, chunk, index)


@needs_interpreter
@every_case
def test_the_guard_matches_the_reference(emulated: Emulated, case: Case) -> None:
    for emulated.seed in range(SEEDS):
        check_heads(Kernel.CUDA, case, CPU)
        check_recall(Kernel.CUDA, case, CPU)


@pytest.mark.parametrize("probe_rows", ["last", "both"])
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.head_dim == 128])
def test_probe_matches_the_reference(emulated: Emulated, case: Case, probe_rows: str) -> None:
    for emulated.seed in range(SEEDS):
        check_probe(replace(case, probe_rows=probe_rows))


@every_head_dim
def test_attend_follows_scores_that_rise(emulated: Emulated, head_dim: int) -> None:
    case = replace(LATE_FP8, head_dim=head_dim)
    chunk = replace(make_chunk(case, CPU), kv=make_rising_cache(case, CPU))
    for emulated.seed, index in enumerate([*bands(case), tiles(case, 0), tiles(case, 1)]):
        check_attend(attend, chunk, index)


@every_head_dim
def test_every_number_of_fp8_comes_through_as_it_is(emulated: Emulated, head_dim: int) -> None:
    numbers = torch.arange(256).byte().view(FP8)
    numbers = torch.where(numbers.isnan(), 0, numbers.float())
    # A row that sees a single key returns that key's value.
    case = in_fp8(Case("", 1, 0, num_qo_heads=256 // head_dim, num_kv_heads=256 // head_dim, head_dim=head_dim), FP16)
    chunk = make_chunk(case, CPU)
    kv = chunk.kv._replace(v_scale=torch.ones(case.num_kv_heads))
    kv.v[kv.block_table[kv.row, 0], :, 0] = numbers.to(FP8).view(case.num_kv_heads, head_dim)
    attend(replace(chunk, kv=kv), tiles(case, 0), AttendBuffers.allocate(case.num_qo_heads, 1, CPU))
    assert torch.equal(chunk.out.flatten().float(), numbers)


@pytest.mark.parametrize("broken", [pytest.param(statements, id=name) for name, statements in BREAKS.items()])
def test_a_broken_kernel_is_noticed(emulated: Emulated, broken: tuple[str, str]) -> None:
    chunk = make_chunk(LATE_FP8, CPU)
    emulated.leave_out(broken)
    with pytest.raises((AssertionError, RuntimeError)):
        for emulated.seed in range(10):
            check_attend(attend, chunk, tiles(LATE_FP8, emulated.seed))
