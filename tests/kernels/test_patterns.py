# SPDX-License-Identifier: Apache-2.0
"""Heads of one layer with sizes of their own: each keeps what it would keep if all had its sizes."""

import pytest
import torch

from minference_vllm.index import BAND, HALF, HALVES, TILE, BandIndex
from minference_vllm.methods.vertical_slash import VerticalSlashSettings
from minference_vllm.ops import Kernel
from minference_vllm.reference.attend import kept_before
from tests.kernels.cases import Case, make_chunk, make_state

# Numbers of columns and of diagonals, and how many of these are the first columns and the nearest diagonals.
BUDGETS = [(40, 120, 4, 16), (200, 17, 30, 17), (64, 300, 64, 300), (1, 1, 1, 1)]
CASE = Case("four heads", num_rows=130, context_len=450, num_qo_heads=4, num_kv_heads=2)


def kept(index: BandIndex, head: int, tile: int, half: int) -> list[int]:
    return kept_before(index, head, tile, half).tolist()


@pytest.mark.parametrize("kernel", [Kernel.REFERENCE, Kernel.TRITON])
def test_each_head_keeps_what_it_would_keep_among_its_like(kernel: Kernel, device: torch.device) -> None:
    chunk = make_chunk(CASE, device)
    tiles = range(chunk.first_tile, chunk.first_tile + chunk.num_tiles)
    largest = CASE.vertical_slash(kernel, vertical_size=200, slash_size=300)
    state = make_state(CASE, largest, device)
    state.budgets.copy_(torch.tensor(BUDGETS))
    mixed = largest.choose(chunk, state.budgets, state.buffers)
    for head, (columns, diagonals, first, nearest) in enumerate(BUDGETS):
        sizes = {"vertical_size": columns, "slash_size": diagonals, "sink_tokens": first, "local_tokens": nearest}
        alike = CASE.vertical_slash(kernel, **sizes)
        of_its_own = make_state(CASE, alike, device)
        expected = alike.choose(chunk, of_its_own.budgets, of_its_own.buffers)
        for tile in tiles:
            for half in range(HALVES):
                assert kept(mixed, head, tile, half) == kept(expected, head, tile, half), (head, tile, half)


@pytest.mark.parametrize("kernel", [Kernel.REFERENCE, Kernel.TRITON])
def test_a_head_of_a_shape_keeps_the_first_keys_and_the_nearest_whatever_its_rows_weigh(
    kernel: Kernel, device: torch.device
) -> None:
    chunk = make_chunk(CASE, device)
    method = CASE.vertical_slash(kernel, vertical_size=64, slash_size=300)
    state = make_state(CASE, method, device)
    first, nearest = 64, 300
    state.budgets.copy_(torch.tensor([(first, nearest, first, nearest)]))
    index = method.choose(chunk, state.budgets, state.buffers)
    for tile in range(chunk.first_tile, chunk.first_tile + chunk.num_tiles):
        for half in range(HALVES):
            found = set(kept(index, 0, tile, half))
            row = tile * TILE + half * HALF
            # A row's nearest keys are itself and those up to `nearest` - 1 before it.
            needed = {*range(first)} | {*range(max(row - nearest + 1, 0), tile * TILE)}
            assert needed <= found
            # Bands hold whole groups of keys, and one more diagonal group than needed (reference.band_lists).
            assert found - needed <= {*range(max(row - nearest + 1 - 2 * BAND, 0), tile * TILE)}


def test_a_head_keeps_no_more_columns_than_there_is_room_for(device: torch.device) -> None:
    chunk = make_chunk(CASE, device)
    method = CASE.vertical_slash(Kernel.TRITON, vertical_size=8)
    assert isinstance(method.settings, VerticalSlashSettings)
    state = make_state(CASE, method, device)
    state.budgets[:, 0] = 10_000
    index = method.choose(chunk, state.budgets, state.buffers)
    assert (index.columns_indptr[:, -1] <= 8).all()
