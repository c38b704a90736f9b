# SPDX-License-Identifier: Apache-2.0
"""The probe in CUDA C++ against its plain-torch twin."""

from dataclasses import replace

import pytest
import torch

from minference_vllm import reference
from minference_vllm.kernels.cuda.library import SUPPORTED_HEAD_DIMS
from minference_vllm.kernels.cuda.probe import probe, supports
from minference_vllm.ops import Kernel
from minference_vllm.scratch import MASS_UNIT, ProbeBuffers
from tests.kernels.cases import CASES, GPU_CASES, Case, make_chunk
from tests.kernels.checks import check_probe, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]

OWN_CASES = [
    Case("both probes, 40 rows", num_rows=40, context_len=100, probe_rows="both", head_dim=128),
    Case("spread probes, prime lengths", num_rows=211, context_len=307, probe_rows="spread"),
    Case("spread probes, whole prompt", num_rows=5000, context_len=0, probe_rows="spread", head_dim=128),
    Case("group of eight", num_qo_heads=8, num_kv_heads=1, num_rows=1500, context_len=3000, head_dim=128),
    Case("group of twelve", num_qo_heads=24, num_kv_heads=2, num_rows=700, context_len=1000, head_dim=128),
    Case("group of five", num_qo_heads=5, num_kv_heads=1, num_rows=700, context_len=1000, probe_rows="both"),
    Case("many KV heads", num_qo_heads=40, num_kv_heads=40, num_rows=300, context_len=2000),
    Case("page 48, HND", num_rows=2100, context_len=3001, page_size=48, layout="HND", head_dim=128),
    Case("Llama 3.1 8B", num_rows=2048, context_len=30_000, num_qo_heads=32, num_kv_heads=8, head_dim=128),
    Case("64K context, both", num_rows=2048, context_len=65_536, probe_rows="both"),
]
every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{case.name}, {str(case.dtype)[6:]}")
        for case in [*CASES, *GPU_CASES, *OWN_CASES, *(replace(case, dtype=torch.bfloat16) for case in OWN_CASES)]
        if case.dtype != torch.float32 and case.head_dim in SUPPORTED_HEAD_DIMS
    ],
)


def run(function, case: Case, device: torch.device, times: int = 1) -> list[ProbeBuffers]:
    """Buffers after a probe of the same chunk; before the probe they are full of another request's results."""
    chunk, counts = make_chunk(case, device), case.vertical_slash(Kernel.CUDA).settings.probe_counts
    if function is probe:
        assert supports(chunk, *counts)
    results = []
    for _ in range(times):
        buffers = ProbeBuffers.allocate(case.num_qo_heads, sum(counts), case.shape.max_seq_len, device)
        for left_over in (buffers.vertical, buffers.slash, buffers.lse, buffers.partial_max, buffers.partial_sum):
            left_over.fill_(7)
        function(chunk, *counts, buffers)
        results.append(buffers)
    return results


@every_case
def test_masses_are_those_of_the_reference(case: Case, device: torch.device) -> None:
    (expected,), (actual,) = run(reference.probe, case, device), run(probe, case, device)
    torch.testing.assert_close(actual.lse, expected.lse, rtol=1e-4, atol=1e-4)
    present = expected.lse.isfinite().sum(1)
    for name in ("vertical", "slash"):
        mass, want = getattr(actual, name), getattr(expected, name)
        inside = slice(0, case.seq_len)
        # Every probe row's mass is 1, up to half a unit of rounding for each of its entries.
        total = mass[:, inside].sum(1) * MASS_UNIT
        torch.testing.assert_close(total, present.to(total), rtol=1e-2, atol=0)
        assert relative_error(mass[:, inside], want[:, inside]) < 2e-3
        assert (mass[:, case.seq_len :] == 7).all()


@every_case
def test_ten_runs_give_the_same_bits(case: Case, device: torch.device) -> None:
    first, *others = run(probe, case, device, times=10)
    for other in others:
        assert torch.equal(other.lse, first.lse)
        assert torch.equal(other.vertical, first.vertical)
        assert torch.equal(other.slash, first.slash)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in OWN_CASES if case.head_dim == 128])
def test_masses_over_a_cache_in_fp8_are_those_of_the_reference(case: Case, device: torch.device) -> None:
    in_fp8 = replace(case, has_fp8_kv=True, has_fp8_q=True, per_head=True)
    assert supports(make_chunk(in_fp8, device), *case.vertical_slash(Kernel.CUDA).settings.probe_counts)
    check_probe(in_fp8, device, Kernel.CUDA)
