# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the CPU, where tests/emulator stands for the GPU: copies and wgmma come late, in random order."""

import itertools
import platform
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from minference_vllm import reference
from minference_vllm.chunk import Chunk
from minference_vllm.index import BandIndex
from minference_vllm.kernels.cuda.attend import attend
from minference_vllm.kernels.cuda.probe import probe
from minference_vllm.ops import Kernel
from minference_vllm.reference.pages import gather
from minference_vllm.scratch import AttendBuffers, ProbeBuffers
from tests.conftest import ON_CI
from tests.kernels.breaks import ATTEND_BREAKS, PROBE_BREAKS, TILES_BREAKS
from tests.kernels.cases import CASES, SINK_CASES, Case, make_chunk, make_rising_cache
from tests.kernels.checks import check_attend, relative_error
from tests.kernels.emulated import Emulated, needs_interpreter
from tests.kernels.indexes import (
    NOTHING,
    TILES,
    Kept,
    index_of,
    random_tile_index,
    tile_index_of,
    tile_mask_of,
    tiles_in_turn,
)
from tests.kernels.recalls import check_heads, check_recall

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None and not ON_CI, reason="needs g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks of x86-64"),
]

CPU = torch.device("cpu")
SEEDS = 2
DTYPES = (torch.float16, torch.bfloat16)
SUPPORTED = [case for case in CASES if case.dtype != torch.float32 and case.head_dim in (64, 128)]
PROBE_CASES = [
    *SUPPORTED,
    # These have few slots for keys, and warpgroups that take turns.
    Case("group of eight", num_rows=100, context_len=900, num_qo_heads=8, num_kv_heads=1, head_dim=128),
    Case("group of twelve", num_rows=70, context_len=500, num_qo_heads=12, num_kv_heads=1, probe_rows="both"),
]
GROUP_OF_EIGHT = PROBE_CASES[-2]

# All chunks but the first begin or end within a tile.
TILE_CASES = [
    Case("whole tiles", num_rows=256, context_len=640, num_qo_heads=2, num_kv_heads=2),
    Case("page 48", num_rows=150, context_len=500, num_qo_heads=4, num_kv_heads=1, page_size=48, head_dim=128),
    Case("page 128, HND", num_rows=129, context_len=600, num_qo_heads=3, num_kv_heads=1, page_size=128, layout="HND"),
    Case("no context", num_rows=333, context_len=0, num_qo_heads=2, num_kv_heads=1, head_dim=128),
    Case("1 row", num_rows=1, context_len=699, num_qo_heads=8, num_kv_heads=1, page_size=32),
    Case("group of seven", num_rows=70, context_len=440, num_qo_heads=7, num_kv_heads=1, layout="HND", head_dim=128),
    Case("sinks", num_rows=130, context_len=450, num_qo_heads=5, num_kv_heads=1, has_sinks=True),
]

LATE = Case("", num_rows=200, context_len=1100, num_qo_heads=2, num_kv_heads=1, head_dim=128)
# One half has many private stages and the other none or many. No method chooses so, but the kernel must take it.
HAND_WRITTEN = {
    "nothing but each tile's own keys": [NOTHING, NOTHING],
    "many bands of the second half, none of the first": [Kept([], [], list(range(1, 81)), [0, 400]), NOTHING],
    "many bands of the first half, none of the second": [Kept([], list(range(1, 81)), [], [3, 200]), NOTHING],
    "few against many": [Kept([], [1, 2], list(range(3, 30)), [5]), Kept([], list(range(9, 49)), [1, 8], [])],
    "pairs among shared stages": [
        Kept(list(range(1, 20)), list(range(20, 40)), list(range(40, 49)), [0, 100, 640]),
        Kept(list(range(20, 49)), list(range(1, 10)), list(range(10, 20)), [0, 17, 127, 128]),
    ],
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """What torch computes here is so small that further threads of its own would only spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def named(cases: list[Case]) -> list:
    """The cases with the two dtypes in turn."""
    typed = [replace(case, dtype=dtype) for case, dtype in zip(cases, itertools.cycle(DTYPES), strict=False)]
    return [pytest.param(case, id=f"{case.name}, {str(case.dtype)[6:]}") for case in typed]


def chosen_index(case: Case, chunk: Chunk) -> BandIndex:
    method = case.vertical_slash(Kernel.REFERENCE)
    return method.choose(chunk, method.budgets(case.num_qo_heads, CPU), method.scratch(case.shape, CPU))


@pytest.mark.parametrize("case", named([*SUPPORTED, *SINK_CASES]))
def test_attend_matches_the_reference(emulated: Emulated, case: Case) -> None:
    chunk = make_chunk(case, CPU)
    index = chosen_index(case, chunk)
    for emulated.seed in range(SEEDS):
        check_attend(attend, chunk, index)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [pytest.param(heads, id=name) for name, heads in HAND_WRITTEN.items()])
def test_attend_takes_any_band_index(emulated: Emulated, heads: list[Kept], head_dim: int) -> None:
    case = replace(LATE, head_dim=head_dim)
    chunk, index = make_chunk(case, CPU), index_of(heads, case, CPU)
    for emulated.seed in range(SEEDS):
        check_attend(attend, chunk, index)


@pytest.mark.parametrize("case", named([*TILE_CASES, LATE, replace(LATE, head_dim=64)]))
def test_attend_takes_any_tile_index(emulated: Emulated, case: Case) -> None:
    chunk = make_chunk(case, CPU)
    for emulated.seed in range(SEEDS + 1):
        check_attend(attend, chunk, tile_index_of(tiles_in_turn(emulated.seed), case, CPU))


@pytest.mark.parametrize("case", named(TILE_CASES))
def test_attend_takes_random_tile_indexes(emulated: Emulated, case: Case) -> None:
    generator = torch.Generator().manual_seed(0)
    chunk = make_chunk(case, CPU)
    for emulated.seed in range(SEEDS):
        check_attend(attend, chunk, random_tile_index(case, generator, CPU))


@needs_interpreter
@pytest.mark.parametrize("case", named(TILE_CASES))
def test_the_guard_matches_the_reference(emulated: Emulated, case: Case) -> None:
    for emulated.seed in range(SEEDS):
        check_heads(Kernel.CUDA, case, CPU)
        check_recall(Kernel.CUDA, case, CPU)


def test_the_reference_attends_to_what_a_tile_index_defines() -> None:
    case = replace(LATE, head_dim=64, dtype=torch.float32)
    chunk, mask = make_chunk(case, CPU), tile_mask_of(TILES, case)
    buffers = AttendBuffers.allocate(case.num_qo_heads, case.num_rows, CPU)
    reference.attend(chunk, tile_index_of(TILES, case, CPU), buffers)
    keys, values = gather(chunk.kv, case.seq_len)
    expected = torch.nn.functional.scaled_dot_product_attention(
        chunk.q.transpose(0, 1), keys, values, mask, scale=case.scale, enable_gqa=True
    )
    torch.testing.assert_close(chunk.out, expected.transpose(0, 1))
    assert buffers.kept_pairs.item() == mask.sum()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
def test_attend_follows_scores_that_rise(emulated: Emulated, dtype: torch.dtype) -> None:
    case = replace(LATE, dtype=dtype)
    chunk = replace(make_chunk(case, CPU), kv=make_rising_cache(case, CPU))
    for heads in HAND_WRITTEN.values():
        check_attend(attend, chunk, index_of(heads, case, CPU))
    check_attend(attend, chunk, tile_index_of(TILES, case, CPU))


def check_probe(case: Case) -> None:
    chunk, counts = make_chunk(case, CPU), case.vertical_slash(Kernel.CUDA).settings.probe_counts
    results = []
    for function in (reference.probe, probe):
        buffers = ProbeBuffers.allocate(case.num_qo_heads, sum(counts), case.shape.max_seq_len, CPU)
        for left_over in (buffers.vertical, buffers.slash, buffers.lse):
            left_over.fill_(7)
        function(chunk, *counts, buffers)
        results.append(buffers)
    expected, actual = results
    torch.testing.assert_close(actual.lse, expected.lse, rtol=1e-4, atol=1e-4)
    for name in ("vertical", "slash"):
        mass, want = getattr(actual, name), getattr(expected, name)
        assert relative_error(mass[:, : case.seq_len], want[:, : case.seq_len]) < 2e-3
        assert (mass[:, case.seq_len :] == 7).all()


@pytest.mark.parametrize("case", named(PROBE_CASES))
def test_probe_matches_the_reference(emulated: Emulated, case: Case) -> None:
    for emulated.seed in range(SEEDS):
        check_probe(case)


@pytest.mark.parametrize("broken", [pytest.param(statements, id=name) for name, statements in ATTEND_BREAKS.items()])
def test_a_broken_attend_is_noticed(emulated: Emulated, broken: tuple[str, str]) -> None:
    chunks = make_chunk(LATE, CPU), replace(make_chunk(LATE, CPU), kv=make_rising_cache(LATE, CPU))
    indexes = [index_of(heads, LATE, CPU) for heads in HAND_WRITTEN.values()]
    emulated.leave_out(broken)
    with pytest.raises((AssertionError, RuntimeError)):
        for emulated.seed, chunk, index in itertools.product(range(10), chunks, indexes):
            check_attend(attend, chunk, index)


@pytest.mark.parametrize("broken", [pytest.param(statements, id=name) for name, statements in TILES_BREAKS.items()])
def test_a_broken_attend_to_tiles_is_noticed(emulated: Emulated, broken: tuple[str, str]) -> None:
    chunk = make_chunk(LATE, CPU)
    emulated.leave_out(broken)
    with pytest.raises((AssertionError, RuntimeError)):
        for emulated.seed in range(10):
            check_attend(attend, chunk, tile_index_of(tiles_in_turn(emulated.seed), LATE, CPU))


@pytest.mark.parametrize("broken", [pytest.param(statements, id=name) for name, statements in PROBE_BREAKS.items()])
def test_a_broken_probe_is_noticed(emulated: Emulated, broken: tuple[str, str]) -> None:
    emulated.leave_out(broken)
    with pytest.raises((AssertionError, RuntimeError)):
        for emulated.seed in range(10):
            check_probe(GROUP_OF_EIGHT)


def test_a_deadlock_is_reported(emulated: Emulated) -> None:
    chunk = make_chunk(LATE, CPU)
    index = index_of(HAND_WRITTEN["many bands of the second half, none of the first"], LATE, CPU)
    emulated.leave_out(ATTEND_BREAKS["the halves' stages are not evened out"])
    with pytest.raises(RuntimeError, match=r"deadlock[\s\S]*mbarrier"):
        check_attend(attend, chunk, index)
