# SPDX-License-Identifier: Apache-2.0
"""The attending kernels on shapes and indexes that nobody thought of."""

import random

import pytest
import torch

from minference_vllm.estimators.vertical_slash import index_masses
from minference_vllm.index import SparseIndex
from minference_vllm.workspace import Workspace
from tests.kernels.cases import Case, make_cache, make_queries, make_workspace
from tests.kernels.checks import check_attend
from tests.kernels.engines import CUDA, REFERENCE, TRITON

GROUPS, SHAPES_A_GROUP = 20, 25


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


def random_index(case: Case, ws: Workspace, generator: torch.Generator) -> SparseIndex:
    """Columns and diagonals of random mass, some in clusters."""
    for mass in (ws.vertical, ws.slash):
        noise = torch.rand(mass.shape, generator=generator)
        clusters = noise[:, ::50].repeat_interleave(50, 1)[:, : mass.shape[1]]
        mass.copy_((torch.where(noise[:, :1] < 0.5, noise, clusters) * 2**20).int())
    # Nothing forced: the local band may be missing.
    return index_masses(case.seq_len, case.config(sink_tokens=0, local_tokens=1), REFERENCE, ws)


@pytest.mark.gpu
@pytest.mark.parametrize("group", range(GROUPS))
@pytest.mark.parametrize(
    "attend",
    [pytest.param(TRITON.attend, id="triton"), pytest.param(CUDA.attend, id="cuda", marks=pytest.mark.hopper)],
)
def test_attend_matches_the_reference_on_random_shapes(attend, group: int, device: torch.device) -> None:
    rng, generator = random.Random(group), torch.Generator().manual_seed(group)
    for _ in range(SHAPES_A_GROUP if attend is CUDA.attend else 1):  # a variant of the Triton kernel takes seconds
        case = random_case(rng)
        q, kv = make_queries(case, device), make_cache(case, device)
        ws = make_workspace(case, case.config(), device)
        index = random_index(case, ws, generator)
        check_attend(attend, case, index, q, kv)
