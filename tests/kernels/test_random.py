# SPDX-License-Identifier: Apache-2.0
"""The attending kernels on shapes and indexes that nobody thought of."""

import random
from dataclasses import replace

import pytest
import torch

from minference_vllm.index import BandIndex
from minference_vllm.kernels import cuda
from minference_vllm.methods.vertical_slash import VerticalSlashBuffers
from minference_vllm.ops import Kernel
from tests.kernels.cases import Case, make_chunk
from tests.kernels.checks import attend_with, check_attend
from tests.kernels.indexes import random_tile_index
from tests.kernels.recalls import check_heads, check_recall

NUM_GROUPS, SHAPES_PER_GROUP = 20, 25


def random_case(rng: random.Random) -> Case:
    num_kv_heads = rng.choice([1, 2, 3])
    return Case(
        "random",
        num_rows=rng.choice([rng.randint(1, 200), rng.randint(1, 900)]),
        context_len=rng.choice([0, rng.randint(1, 300), rng.randint(1, 3000)]),
        num_qo_heads=num_kv_heads * rng.choice([1, 2, 4, 7]),
        num_kv_heads=num_kv_heads,
        head_dim=rng.choice([64, 128]),
        page_size=rng.choice([16, 32, 48, 64, 128]),
        dtype=rng.choice([torch.bfloat16, torch.float16]),
        layout=rng.choice(["NHD", "HND"]),
        vertical_size=rng.choice([1, 30, 129, 700]),
        slash_size=rng.choice([1, 20, 300, 2000]),
    )


def random_index(case: Case, generator: torch.Generator, device: torch.device) -> BandIndex:
    """Columns and diagonals of random mass, some in clusters."""
    # Nothing is kept by force, so that the local band may be missing.
    method = case.vertical_slash(Kernel.REFERENCE, sink_tokens=0, local_tokens=1)
    buffers: VerticalSlashBuffers = method.scratch(case.shape, device)
    for mass in (buffers.probe.vertical, buffers.probe.slash):
        noise = torch.rand(mass.shape, generator=generator)
        clusters = noise[:, ::50].repeat_interleave(50, 1)[:, : mass.shape[1]]
        mass.copy_((torch.where(noise[:, :1] < 0.5, noise, clusters) * 2**20).int())
    return method.index_masses(case.seq_len, method.budgets(case.num_qo_heads, device), buffers)


@pytest.mark.gpu
@pytest.mark.parametrize("group", range(NUM_GROUPS))
@pytest.mark.parametrize("kernel", [Kernel.TRITON, pytest.param(Kernel.CUDA, marks=pytest.mark.hopper)])
def test_attend_matches_the_reference_on_random_shapes(kernel: Kernel, group: int, device: torch.device) -> None:
    rng, generator = random.Random(group), torch.Generator().manual_seed(group)
    for _ in range(SHAPES_PER_GROUP if kernel is Kernel.CUDA else 1):  # a variant of the Triton kernel takes seconds
        case = random_case(rng)
        chunk = make_chunk(case, device)
        for draw in (random_index, random_tile_index):
            check_attend(attend_with(kernel), chunk, draw(case, generator, device))


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("group", range(NUM_GROUPS // 2))
def test_attend_over_a_cache_in_fp8_matches_the_reference_on_random_shapes(group: int, device: torch.device) -> None:
    rng, generator = random.Random(group), torch.Generator().manual_seed(group)
    for _ in range(SHAPES_PER_GROUP):
        case = replace(random_case(rng), has_fp8_kv=True, has_fp8_q=True, per_head=rng.random() < 0.5)
        chunk = make_chunk(case, device)
        assert cuda.attend.supports(chunk)
        for draw in (random_index, random_tile_index):
            check_attend(cuda.attend.attend, chunk, draw(case, generator, device))
        check_heads(Kernel.CUDA, case, device)


@pytest.mark.gpu
@pytest.mark.parametrize("group", range(NUM_GROUPS // 4))
@pytest.mark.parametrize("kernel", [Kernel.TRITON, pytest.param(Kernel.CUDA, marks=pytest.mark.hopper)])
def test_the_guard_matches_the_reference_on_random_shapes(kernel: Kernel, group: int, device: torch.device) -> None:
    rng = random.Random(group)
    for _ in range(SHAPES_PER_GROUP if kernel is Kernel.CUDA else 1):
        case = random_case(rng)
        check_recall(kernel, case, device)
        check_heads(kernel, case, device)
