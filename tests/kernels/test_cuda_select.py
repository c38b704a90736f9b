# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels that select groups and boxes, on a GPU, against Triton's; smaller chunks are in
test_emulated_select.py."""

import pytest
import torch
from torch.nn.functional import pad

from minference_vllm.kernels import triton
from minference_vllm.kernels.cuda.select import select_boxes, select_groups
from tests.kernels.blocks import make_boxes, make_index, make_masses, parts_of
from tests.kernels.cases import Case, make_chunk
from tests.kernels.test_block import all_codes, assert_same_lists
from tests.kernels.test_boxes import random_codes, share_of

pytestmark = pytest.mark.hopper

CASES = [
    Case("16K rows at 32K", num_rows=16_384, context_len=16_384, num_qo_heads=8, num_kv_heads=2),
    Case("4K rows at 128K", num_rows=4_100, context_len=127_001, num_qo_heads=14, num_kv_heads=2),
    Case("1K rows at 1M", num_rows=1_000, context_len=1_047_000, num_qo_heads=4, num_kv_heads=1),
]
every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
TIMES = 3  # runs of each kernel: threads interleave differently each time


@every_case
@pytest.mark.parametrize("kind", ["random", "steep", "falling"])
@pytest.mark.parametrize("rows_per_half", [16, 32, 64])
def test_groups(case: Case, kind: str, rows_per_half: int, device: torch.device) -> None:
    chunk = make_chunk(case, device)
    groups = -(-chunk.seq_len // 128) * 8
    masses = torch.empty(case.num_qo_heads, parts_of(chunk, rows_per_half), -(-groups // 16) * 16).byte()
    masses = all_codes(kind, masses.shape, torch.Generator().manual_seed(3)).to(device)
    share, numbers = share_of(chunk, 0.7), (4, 8, 2048)
    expected = make_index(chunk, groups)
    triton.select_groups(masses.clone(), chunk, share, rows_per_half, *numbers, True, expected)
    for _ in range(TIMES):
        actual = make_index(chunk, groups)
        select_groups(masses.clone(), chunk, share, rows_per_half, *numbers, actual)
        assert_same_lists(actual, expected)


@every_case
@pytest.mark.parametrize("largest", [230, 3])
@pytest.mark.parametrize("rows_per_half", [16, 32])
def test_boxes(case: Case, largest: int, rows_per_half: int, device: torch.device) -> None:
    chunk = make_chunk(case, device)
    codes = random_codes(chunk, case.num_qo_heads, rows_per_half, 0, largest)
    codes = pad(codes, (0, -codes.shape[2] % 16)).contiguous()
    share, room = share_of(chunk, 0.8), max(40, chunk.first_tile // 2)
    results = []
    for run in (triton.select_boxes, *[select_boxes] * TIMES):
        boxes, masses = make_boxes(chunk, rows_per_half, room), make_masses(chunk, case.num_qo_heads, rows_per_half)
        run(codes, chunk, share, rows_per_half, 1, 2, boxes, masses)
        valid = torch.arange(room, device=device) < boxes.counts[..., None]
        results.append((boxes.counts, boxes.numbers * valid, masses))
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert torch.equal(actual, expected)
