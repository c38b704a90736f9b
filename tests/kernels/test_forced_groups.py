# SPDX-License-Identifier: Apache-2.0
"""Selecting groups when more or fewer of them are always kept than the normaliser has seen."""

import pytest
import torch

from minference_vllm import reference
from minference_vllm.kernels import triton
from tests.kernels.blocks import make_index, make_masses
from tests.kernels.cases import Case, make_chunk
from tests.kernels.test_block import all_codes, assert_same_lists


@pytest.mark.parametrize("sinks", [0, 1, 4, 9])
@pytest.mark.parametrize("local", [0, 3, 5, 8, 40])
@pytest.mark.parametrize("by_tile", [False, True], ids=["by half", "by tile"])
def test_any_number_of_groups_may_be_kept_by_force(sinks: int, local: int, by_tile: bool, device: torch.device) -> None:
    chunk = make_chunk(Case("", 300, 128, num_qo_heads=4, num_kv_heads=1), device)
    masses = make_masses(chunk, 4, 16)
    masses.copy_(all_codes("random", masses.shape, torch.Generator().manual_seed(sinks + local)))
    masses[:, :, 3] = 240  # the last that the normaliser has seen: its mass counts once
    share = torch.tensor([0.5, 0.7, 0.78, 0.9], device=device)
    expected, actual = make_index(chunk, masses.shape[2]), make_index(chunk, masses.shape[2])
    reference.select_groups(masses, chunk, share, 16, sinks, local, 50, by_tile, expected)
    triton.select_groups(masses.clone(), chunk, share, 16, sinks, local, 50, by_tile, actual)
    assert_same_lists(actual, expected)
