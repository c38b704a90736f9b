# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels that score means of keys, on the CPU: see test_emulated.py."""

import ctypes
import platform
import shutil
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from minference_vllm import reference
from minference_vllm.boxes import BOX_MEAN, LISTS, Boxes
from minference_vllm.chunk import Chunk
from minference_vllm.index import GROUP, GROUPS_PER_TILE, HALF, HALVES, TILE
from minference_vllm.kernels.cuda import library
from minference_vllm.kernels.cuda.masses import group_masses, supports
from minference_vllm.reference.normalisers import PART
from minference_vllm.scratch import FP8
from tests.conftest import ON_CI
from tests.emulator.build import Build, can_leave_out
from tests.kernels.blocks import make_coarse, make_means
from tests.kernels.cases import Case, make_chunk

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None and not ON_CI, reason="needs g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks of x86-64"),
]

CPU = torch.device("cpu")
FP16, BF16 = torch.float16, torch.bfloat16
MULTIPROCESSORS = (1, 7, 40)
UNTOUCHED = 99
# A mass that lies midway between two codes may be rounded to either. Of products in FP8 the sums are in fp16.
ROUNDED_OTHERWISE = {False: 0.03, True: 0.12}

CASES = [
    Case("whole tiles", num_rows=256, context_len=512, num_qo_heads=2, num_kv_heads=1),
    Case("chunk inside a tile", num_rows=150, context_len=300, head_dim=128, dtype=BF16),
    Case("no context", num_rows=260, context_len=0, dtype=BF16),
    Case("second half only", num_rows=40, context_len=200, head_dim=128),
    # One row counts for all that are sampled, so its errors do not average out: only many codes show how many differ.
    Case("1 row", num_rows=1, context_len=2000, num_kv_heads=1, dtype=BF16),
    Case("no grouping", num_rows=180, context_len=140, num_qo_heads=3, num_kv_heads=3, dtype=BF16),
    Case("group of seven", num_rows=100, context_len=220, num_qo_heads=14, num_kv_heads=2),
    Case("group of eight", num_rows=70, context_len=1000, num_qo_heads=8, num_kv_heads=1, head_dim=128),
    Case("more stages than slots", num_rows=64, context_len=5000, num_qo_heads=2, num_kv_heads=1, dtype=BF16),
    Case("ranges of means", num_rows=129, context_len=3967, num_qo_heads=2, num_kv_heads=1, head_dim=128, dtype=BF16),
]
LONGEST = CASES[-1]

# Statements without which the kernels are wrong.
BREAKS = {
    "means are copied over others in use": (
        "score_load.cuh",
        "hopper::wait(&shared.empty[ring.slot], ring.phase ^ 1);",
    ),
    "means are read before they are there": ("score_stages.cuh", "hopper::wait(&shared.full[ring.slot], ring.phase);"),
    "scores are read before they are there": ("score_stages.cuh", "hopper::mma_wait<0>();\n        hopper::pin(odd);"),
    "queries are read before they are there": (
        "score_stages.cuh",
        "hopper::wait_named(1 + warpgroup, hopper::WARPGROUP);",
    ),
    "slots are never left": ("score_stages.cuh", "if (lane == 0) hopper::arrive(&shared.empty[ring.slot]);"),
}


class Emulated:
    """Stands for the library of CUDA kernels."""

    def __init__(self, functions: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
        self.functions = functions
        self.seed = 0  # decides the order of events
        self.left_out = -1
        monkeypatch.setattr(library, "enqueue", self.enqueue)
        # The kernel makes more ranges of means for more multiprocessors.
        self.num_multiprocessors = 1
        monkeypatch.setattr(library, "num_multiprocessors", lambda device: self.num_multiprocessors)

    def enqueue(self, function: str, arguments: ctypes.Structure, device: torch.device) -> None:
        self.functions.emulator_begin(self.seed, self.left_out)
        if error := self.functions[function](ctypes.byref(arguments), None):
            raise RuntimeError(f"{function}, seed {self.seed}: {self.functions.minference_error(error).decode()}")


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    edits = [can_leave_out(number, *statement) for number, statement in enumerate(BREAKS.values())]
    return Build(tmp_path_factory.mktemp("score"), edits, only="score.cu")


@pytest.fixture
def emulated(build: Build, monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return Emulated(build.functions, monkeypatch)


def make_inputs(case: Case, is_fp8: bool) -> tuple[Chunk, torch.Tensor]:
    """A chunk, and means with NaN past the last key."""
    chunk = make_chunk(case, CPU)
    return chunk, make_means(chunk, is_fp8=is_fp8)


def normalisers(chunk: Chunk, means: torch.Tensor, rows_per_half: int) -> torch.Tensor:
    row_lse = torch.full((chunk.num_qo_heads, chunk.num_tiles * HALVES + 3, rows_per_half), torch.nan)
    reference.row_normalisers(chunk, means, row_lse)
    return row_lse


def written(chunk: Chunk, like: torch.Tensor, parts_per_half: int) -> torch.Tensor:
    """[parts, groups] bool: the groups before the tile of each part."""
    tile = torch.arange(like.shape[1])[:, None] // (HALVES * parts_per_half)
    before = torch.arange(like.shape[2]) < (chunk.first_tile + tile) * GROUPS_PER_TILE
    return before & (tile < chunk.num_tiles)


def has_rows(chunk: Chunk, num_parts: int, parts_per_half: int) -> torch.Tensor:
    """[parts, 1] bool: the parts of halves of which the chunk has a row."""
    start = torch.arange(num_parts)[:, None] // parts_per_half * HALF + chunk.first_tile * TILE
    return (start + HALF > chunk.context_len) & (start < chunk.seq_len)


def run_masses(chunk: Chunk, means: torch.Tensor, row_lse: torch.Tensor) -> torch.Tensor:
    """Masses of a kernel, in a buffer that is larger than they are."""
    groups = (chunk.first_tile + chunk.num_tiles) * GROUPS_PER_TILE
    parts = chunk.num_tiles * HALVES * row_lse.shape[2] // PART
    masses = torch.full((chunk.num_qo_heads + 1, parts + 1, groups + 3), UNTOUCHED, dtype=torch.uint8)
    group_masses(chunk, means, row_lse, masses)
    return masses


def check_masses(case: Case, rows_per_half: int = 16, loudness: float = 1.0, is_fp8: bool = False) -> torch.Tensor:
    chunk, means = make_inputs(case, is_fp8)
    if loudness != 1:
        chunk = replace(chunk, q=chunk.q * loudness)
    row_lse, parts_per_half = normalisers(chunk, means, rows_per_half), rows_per_half // PART
    assert supports(chunk, means.dtype, rows_per_half)
    actual = run_masses(chunk, means, row_lse)
    num_heads = case.num_qo_heads
    expected = torch.full_like(actual, UNTOUCHED)
    reference.group_masses(chunk, means, row_lse, expected)
    is_written = written(chunk, actual, parts_per_half)
    counted = is_written & has_rows(chunk, actual.shape[1], parts_per_half)
    assert (actual[:num_heads, ~is_written] == UNTOUCHED).all()
    assert (actual[num_heads:] == UNTOUCHED).all()
    difference = (actual[:num_heads].int() - expected[:num_heads].int()).abs()[:, counted]
    if difference.numel():
        # Sums in fp16 are off by a part of the score, so those of loud rows by up to an octave and a half.
        assert difference.max() <= (1 if loudness == 1 or not is_fp8 else 12)
        assert difference.sum() <= max(1, ROUNDED_OTHERWISE[is_fp8] * difference.numel())
    return actual


in_models_dtype = [(case, rows, False) for case in CASES for rows in (16, 32)] + [(CASES[1], 64, False)]
in_fp8 = [(replace(case, head_dim=128), rows, True) for case, rows in zip(CASES, [16, 32] * 5, strict=True)]
# Queries and the cache are in FP8 too.
of_fp8 = [
    (replace(case, name=f"FP8, {case.name}", has_fp8_kv=True, has_fp8_q=True, per_head=True), rows, is_fp8)
    for case, rows, is_fp8 in [*in_models_dtype[:6], *in_fp8[::3]]
]


@pytest.mark.parametrize(
    ("case", "rows_per_half", "is_fp8"),
    [pytest.param(*params, id=f"{params[0].name}, {params[1:]}") for params in in_models_dtype + in_fp8 + of_fp8],
)
def test_masses_match_the_reference(emulated: Emulated, case: Case, rows_per_half: int, is_fp8: bool) -> None:
    results = []
    for emulated.seed, emulated.num_multiprocessors in enumerate(MULTIPROCESSORS):
        results.append(check_masses(case, rows_per_half, is_fp8=is_fp8))
    assert all(torch.equal(result, results[0]) for result in results)


def codes_of(
    kernel: Callable[..., None],
    chunk: Chunk,
    row_lse: torch.Tensor,
    means: torch.Tensor,
    mean: int,
    boxes: Boxes | None,
) -> torch.Tensor:
    codes = torch.full((chunk.num_qo_heads, chunk.num_tiles * HALVES * 2, 5000 // 16), UNTOUCHED, dtype=torch.uint8)
    kernel(chunk, means, row_lse, codes, mean, boxes)
    return codes


@pytest.mark.parametrize("case", [CASES[0], CASES[7], LONGEST], ids=lambda case: case.name)
@pytest.mark.parametrize("is_fp8", [False, True])
def test_masses_of_boxes_match_the_reference(emulated: Emulated, case: Case, is_fp8: bool) -> None:
    chunk, means = make_inputs(replace(case, head_dim=128), is_fp8)
    inputs = chunk, normalisers(chunk, means, 32), make_coarse(chunk, means), BOX_MEAN, None
    expected = codes_of(reference.group_masses, *inputs)
    for emulated.seed, emulated.num_multiprocessors in enumerate(MULTIPROCESSORS):
        check_codes(codes_of(group_masses, *inputs), expected, is_fp8)


@pytest.mark.parametrize("room", [3, 20])
@pytest.mark.parametrize("case", [CASES[1], CASES[6], LONGEST], ids=lambda case: case.name)
def test_masses_in_some_boxes_match_the_reference(emulated: Emulated, case: Case, room: int) -> None:
    chunk, means = make_inputs(case, is_fp8=False)
    lists = chunk.num_tiles * HALVES * 2 * chunk.group_size
    generator = torch.Generator().manual_seed(room)
    numbers = torch.full((case.num_kv_heads, -(-lists // LISTS), room), 10**6, dtype=torch.int32)
    counts = torch.randint(room + 1, numbers.shape[:2], generator=generator, dtype=torch.int32)
    for block, count in zip(numbers.flatten(0, 1), counts.flatten().tolist(), strict=True):
        order = torch.randperm(max(chunk.first_tile + chunk.num_tiles - 1, room), generator=generator)
        block[:count] = order[:count].sort().values
    boxes = Boxes(numbers, counts, torch.zeros(0))
    inputs = chunk, normalisers(chunk, means, 32), means, 4, boxes
    expected = codes_of(reference.group_masses, *inputs)
    for emulated.seed, emulated.num_multiprocessors in enumerate(MULTIPROCESSORS):
        check_codes(codes_of(group_masses, *inputs), expected)


def check_codes(actual: torch.Tensor, expected: torch.Tensor, is_fp8: bool = False) -> None:
    assert torch.equal(actual == UNTOUCHED, expected == UNTOUCHED)
    difference = (actual.int() - expected.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < ROUNDED_OTHERWISE[is_fp8]


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize(("head_dim", "is_fp8"), [(64, False), (128, False), (128, True)])
def test_no_far_key_counts_more_than_all_that_the_normaliser_has_seen(
    emulated: Emulated, dtype: torch.dtype, head_dim: int, is_fp8: bool
) -> None:
    # Some keys outweigh all that a row's normaliser has seen by a factor of e^30 and far more.
    case = Case("", num_rows=256, context_len=1024, num_qo_heads=2, num_kv_heads=1, head_dim=head_dim, dtype=dtype)
    masses = check_masses(case, 32, loudness=100.0, is_fp8=is_fp8)
    codes = masses[: case.num_qo_heads, :-1, : case.context_len // GROUP]
    # Each row gives some means a mass of 1, and nearly all others none.
    assert 208 < codes.max() < 255
    assert (codes == 0).float().mean() > 0.05


def test_masses_of_rows_past_what_fp8_can_hold(emulated: Emulated) -> None:
    case = Case("", num_rows=200, context_len=512, num_qo_heads=2, num_kv_heads=1, head_dim=128, dtype=BF16)
    check_masses(case, 32, loudness=2000.0, is_fp8=True)


def test_a_large_vector_that_all_keys_share_overflows_no_sum(emulated: Emulated) -> None:
    """Stored with calibrated scales, biases of queries and keys are near FP8's largest number."""
    case = Case("", num_rows=128, context_len=640, num_qo_heads=2, num_kv_heads=1, head_dim=128, dtype=BF16)
    chunk = make_chunk(replace(case, has_fp8_kv=True, has_fp8_q=True), CPU)
    for stored in (chunk.q, chunk.kv.k):
        near_largest = 384 + 32 * torch.randint(3, stored[..., ::32].shape, generator=torch.Generator().manual_seed(0))
        stored[..., ::32] = near_largest.to(FP8)
    assert chunk.q_scale is not None and chunk.kv.k_scale is not None
    chunk = replace(chunk, scale=2e-4 / float(chunk.q_scale[0] * chunk.kv.k_scale[0]))
    means = make_means(chunk, is_fp8=True)
    inputs = chunk, normalisers(chunk, means, 32), means, 4, None
    expected = codes_of(reference.group_masses, *inputs)
    assert len(expected.unique()) > 30
    check_codes(codes_of(group_masses, *inputs), expected, is_fp8=True)


@pytest.mark.parametrize("num_rows", [129, 131])
def test_masses_of_rows_without_a_mean_in_their_tile(emulated: Emulated, num_rows: int) -> None:
    case = Case("", num_rows=num_rows, context_len=256, num_qo_heads=2, num_kv_heads=1)
    check_masses(case, 32)


def test_other_queries_are_not_supported() -> None:
    chunk = make_chunk(CASES[0], CPU)
    assert supports(chunk, FP16, 16)
    assert not supports(chunk, FP16, 8)
    assert not supports(chunk, FP8, 16), "heads of 64"
    assert not supports(replace(chunk, q=chunk.q.float(), out=chunk.out.float()), torch.float32, 16)


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_kernel_is_noticed(emulated: Emulated, broken: str) -> None:
    emulated.left_out = list(BREAKS).index(broken)
    with pytest.raises((AssertionError, RuntimeError)):
        for emulated.seed in range(40):
            check_masses(LONGEST)
