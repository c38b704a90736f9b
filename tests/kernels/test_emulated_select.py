# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels that select groups and boxes, on the CPU: see test_emulated.py."""

import ctypes
import itertools
import platform
import shutil
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import pad

from minference_vllm import reference
from minference_vllm.boxes import LISTS, Boxes
from minference_vllm.index import TileIndex
from minference_vllm.kernels.cuda import library
from minference_vllm.kernels.cuda.select import select_boxes, select_groups, supports
from tests.conftest import ON_CI
from tests.emulator.build import Build
from tests.kernels.blocks import CASES, SPARSE, make_index, parts_of
from tests.kernels.cases import Case, make_chunk
from tests.kernels.test_block import SHARES, all_codes, assert_same_lists
from tests.kernels.test_boxes import check_against_reference, random_codes

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None and not ON_CI, reason="needs g++"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator switches stacks of x86-64"),
]

CPU = torch.device("cpu")
KINDS = ("nothing", "equal", "random", "one group", "falling", "steep")


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return Build(tmp_path_factory.mktemp("emulator"), only="select.cu").functions


@pytest.fixture(autouse=True)
def emulated(functions: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    def enqueue(function: str, arguments: ctypes.Structure, device: torch.device) -> None:
        functions.emulator_begin(0, -1)
        error = functions[function](ctypes.byref(arguments), None)
        assert error == 0, functions.minference_error(error).decode()

    monkeypatch.setattr(library, "enqueue", enqueue)


def check(case: Case, kind: str, rows_per_half: int, sinks: int = 2, local: int = 3) -> TileIndex:
    chunk = make_chunk(case, CPU)
    groups = (chunk.first_tile + chunk.num_tiles) * 8 + 16
    masses = torch.empty(case.num_qo_heads, parts_of(chunk, rows_per_half) + 1, -(-groups // 16) * 16).byte()
    masses.copy_(all_codes(kind, masses.shape, torch.Generator().manual_seed(3)))
    share = torch.tensor(SHARES)[: case.num_qo_heads].contiguous()
    assert supports(masses)
    for max_kept, long_groups in itertools.product((12, masses.shape[2]), (0, 40)):
        expected, actual = make_index(chunk, max_kept), make_index(chunk, max_kept)
        options = share, rows_per_half, sinks, local, long_groups
        reference.select_groups(masses.clone(), chunk, *options, True, expected)
        select_groups(masses.clone(), chunk, *options, actual)
        assert_same_lists(actual, expected)
    return actual


def of(num_rows: int, context_len: int) -> Case:
    return Case("", num_rows, context_len, num_qo_heads=len(SHARES), num_kv_heads=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows_per_half", [16, 32, 64])
def test_groups_that_hold_the_share(kind: str, rows_per_half: int) -> None:
    check(of(90, 400), kind, rows_per_half)


@pytest.mark.parametrize(
    ("num_rows", "context_len"), [(20, 200), (20, 130), (1, 700), (20, 0), (300, 0), (200, 9001)], ids=str
)
def test_chunks_that_begin_and_end_anywhere(num_rows: int, context_len: int) -> None:
    for kind in ("random", "steep"):
        check(of(num_rows, context_len), kind, 32)


def test_lists_longer_than_all_threads_read_at_once() -> None:
    index = check(of(1, 140_000), "random", 16)
    assert index.counts[3, 0, 0] > 2 * 4096


@pytest.mark.parametrize(("sinks", "local"), [(0, 0), (9, 0), (0, 9), (40, 9), (500, 500)])
def test_any_number_of_groups_may_be_kept_by_force(sinks: int, local: int) -> None:
    check(of(90, 400), "steep", 32, sinks, local)


def test_masses_that_lie_otherwise_are_left_to_triton() -> None:
    assert supports(torch.zeros(1, 4, 32, dtype=torch.uint8))
    assert not supports(torch.zeros(1, 4, 32, dtype=torch.uint8)[:, :, 1:])
    assert not supports(torch.zeros(1, 4, 33, dtype=torch.uint8))


def check_boxes(
    case: Case,
    share: float,
    rows_per_half: int = 32,
    room: int = 60,
    largest: int = 230,
    forced: tuple[int, int] = (1, 2),
) -> Boxes:
    chunk = make_chunk(case, CPU)
    room = max(room, sum(forced) + LISTS)
    codes = random_codes(chunk, chunk.num_qo_heads, rows_per_half, 0, largest)
    codes = pad(codes, (0, -codes.shape[2] % 16))
    shares = torch.full((chunk.num_qo_heads,), share)
    return check_against_reference(select_boxes, codes, chunk, shares, rows_per_half, forced, room)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def test_boxes(case: Case) -> None:
    check_boxes(case, 0.6)


@pytest.mark.parametrize("rows_per_half", [16, 64])
@pytest.mark.parametrize("share", [0.05, 0.84, 1.0, 1.5])
def test_boxes_of_any_rows_and_share(share: float, rows_per_half: int) -> None:
    check_boxes(replace(SPARSE, num_qo_heads=14, num_kv_heads=2), share, rows_per_half)


@pytest.mark.parametrize("largest", [230, 3])
@pytest.mark.parametrize("room", [19, 25, 40])
def test_boxes_where_there_is_no_room_for_all(room: int, largest: int) -> None:
    """Of few different codes many are equal, and the first of them stay."""
    boxes = check_boxes(replace(SPARSE, context_len=9000), 1.0, room=room, largest=largest)
    assert (boxes.counts[:-1, :-1] == room).any()


@pytest.mark.parametrize("forced", [(1, 0), (3, 5), (40, 40)])
def test_any_number_of_boxes_may_be_kept_by_force(forced: tuple[int, int]) -> None:
    check_boxes(replace(SPARSE, context_len=9000), 0.7, room=90, forced=forced)


def test_more_boxes_than_all_threads_read_at_once() -> None:
    check_boxes(replace(SPARSE, num_rows=1, context_len=300_000), 0.8, 16, room=900)
