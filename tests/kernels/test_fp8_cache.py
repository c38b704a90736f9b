# SPDX-License-Identifier: Apache-2.0
"""A cache in FP8, also with queries in FP8: each kernel against its plain-torch twin, and the twins against the numbers
that FP8 stands for. Pages that hold no key of the request hold NaN.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from minference_vllm import ops, reference
from minference_vllm.attention import prefill
from minference_vllm.chunk import FP8, Chunk
from minference_vllm.index import TileIndex
from minference_vllm.kernels import cuda
from minference_vllm.methods.block import Block, BlockSettings
from minference_vllm.ops import Kernel
from minference_vllm.reference.dense import dense
from minference_vllm.reference.masses import group_masses
from minference_vllm.reference.operands import from_operand
from minference_vllm.reference.quantized import to_stored
from minference_vllm.scratch import AttendBuffers, ProbeBuffers
from tests.kernels.blocks import make_lse, make_masses, make_means, score_dtypes
from tests.kernels.cases import FP8_CASES, K_SCALE, Case, make_chunk, make_state
from tests.kernels.checks import assert_close, attend_with, check_attend, check_bands, check_probe
from tests.kernels.indexes import random_tile_index, tile_index_of, tiles_in_turn
from tests.kernels.recalls import check_heads, check_recall
from tests.kernels.test_block_scores import check_masses, check_normalisers
from tests.kernels.test_kernels import every_kernel

every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in FP8_CASES])
WHOLE = FP8_CASES[0]


def in_float32(chunk: Chunk) -> Chunk:
    """The numbers that a chunk in FP8 stands for: float32, with the scales multiplied in."""
    kv = chunk.kv
    cache = [stored.float() * scale[:, None, None] for stored, scale in ((kv.k, kv.k_scale), (kv.v, kv.v_scale))]
    k, v = torch.cat(cache, -1).split(chunk.head_dim, -1)
    q = chunk.q.float()
    if chunk.q_scale is not None:
        q = q * chunk.q_scale.repeat_interleave(chunk.group_size)[:, None]
    return Chunk(q, torch.full_like(q, torch.nan), kv._replace(k=k, v=v, k_scale=None, v_scale=None), *rest_of(chunk))


def rest_of(chunk: Chunk) -> tuple[int, float]:
    return chunk.context_len, chunk.scale


def groups_of(case: Case, device: torch.device) -> TileIndex:
    return tile_index_of(tiles_in_turn(case.num_rows), case, device)


@every_case
@every_kernel
def test_attend_to_bands_and_columns(case: Case, kernel: Kernel, device: torch.device) -> None:
    check_bands(case, kernel, device)


@every_case
@every_kernel
def test_attend_to_groups(case: Case, kernel: Kernel, device: torch.device) -> None:
    check_attend(attend_with(kernel), make_chunk(case, device), groups_of(case, device))


@every_case
@every_kernel
def test_attend_for_the_heads_of_the_guard(case: Case, kernel: Kernel, device: torch.device) -> None:
    check_heads(kernel, case, device)


@every_case
@every_kernel
def test_recall(case: Case, kernel: Kernel, device: torch.device) -> None:
    check_recall(kernel, case, device)


@every_case
@every_kernel
def test_probe(case: Case, kernel: Kernel, device: torch.device) -> None:
    check_probe(case, device, kernel)


@every_case
@score_dtypes
def test_normalisers_and_masses(case: Case, is_fp8: bool, device: torch.device) -> None:
    chunk = make_chunk(case, device)
    lse = check_normalisers(chunk, is_fp8=is_fp8)
    check_masses(chunk, make_means(chunk, is_fp8=is_fp8), lse)


@every_case
@score_dtypes
def test_means_of_keys_are_those_of_the_stored_numbers(case: Case, is_fp8: bool, device: torch.device) -> None:
    chunk = make_chunk(case, device)
    plain = in_float32(chunk)
    means, exact = make_means(chunk, is_fp8=is_fp8), make_means(plain)
    for kernel in (Kernel.REFERENCE, Kernel.TRITON):
        means.fill_(7)
        ops.key_means(chunk.kv, chunk.seq_len, means, kernel)
        written, unwritten = means.split([case.seq_len // 4, means.shape[1] - case.seq_len // 4], dim=1)
        numbers = from_operand(written) * chunk.kv.k_scale[:, None, None]
        # Means are rounded once, to 3 bits after the leading one (FP8) or to 7 (bfloat16).
        tolerance = dict(rtol=2**-4, atol=K_SCALE / 128) if is_fp8 else dict(rtol=2**-7, atol=1e-6)
        torch.testing.assert_close(numbers, exact[:, : case.seq_len // 4], **tolerance)
        assert (unwritten.float() == 7).all()


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_cuda_kernel_repeats_bit_for_bit(head_dim: int, device: torch.device) -> None:
    case = replace(WHOLE, num_rows=3000, context_len=9001, num_qo_heads=8, head_dim=head_dim, dtype=torch.bfloat16)
    chunk = make_chunk(case, device)
    for index in (groups_of(case, device), random_tile_index(case, torch.Generator().manual_seed(0), device)):
        outs = []
        for _ in range(10):
            buffers = AttendBuffers.allocate(case.num_qo_heads, case.num_rows, device)
            cuda.attend.attend(chunk, index, buffers)
            outs.append((chunk.out.clone(), buffers.lse))
        assert outs[0][0].isfinite().all()
        assert all(torch.equal(one, other) for out in outs[1:] for one, other in zip(out, outs[0], strict=True))


# The twins


@every_case
def test_the_twins_attend_to_the_numbers_that_fp8_stands_for(case: Case, device: torch.device) -> None:
    chunk = make_chunk(case, device)
    plain, index = in_float32(chunk), groups_of(case, device)
    lse = []
    for of in (chunk, plain):
        buffers = AttendBuffers.allocate(case.num_qo_heads, case.num_rows, device)
        reference.attend(of, index, buffers)
        lse.append(buffers.lse)
    assert_close(chunk.out, plain.out)
    torch.testing.assert_close(*lse, rtol=1e-5, atol=1e-5)
    dense(chunk.q, chunk.kv, *rest_of(chunk), chunk.out, chunk.q_scale)
    dense(plain.q, plain.kv, *rest_of(plain), plain.out)
    assert_close(chunk.out, plain.out)


@every_case
def test_the_twins_choose_by_the_numbers_that_fp8_stands_for(case: Case, device: torch.device) -> None:
    chunk = make_chunk(case, device)
    plain, probes, scores = in_float32(chunk), [], []
    for of in (chunk, plain):
        counts = case.vertical_slash(Kernel.REFERENCE).settings.probe_counts
        buffers = ProbeBuffers.allocate(case.num_qo_heads, sum(counts), case.seq_len, device)
        reference.probe(of, *counts, buffers)
        probes.append(buffers)
        means, lse, masses = torch.empty_like(make_means(plain)), make_lse(plain), make_masses(plain, case.num_qo_heads)
        reference.key_means(of.kv, of.seq_len, means)
        reference.row_normalisers(of, means, lse)
        group_masses(of, means, lse, masses)
        scores.append((lse, masses))
    torch.testing.assert_close(probes[0].lse, probes[1].lse, rtol=1e-5, atol=1e-5)
    assert (probes[0].vertical - probes[1].vertical).abs().max() <= 2 * counts[0] + 2 * counts[1]
    torch.testing.assert_close(scores[0][0], scores[1][0], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert (scores[0][1].int() - scores[1][1].int()).abs().max() <= 1


@pytest.mark.parametrize("method", ["block", "vertical_slash"])
def test_a_whole_prefill_is_that_of_the_same_numbers_in_float32(method: str, device: torch.device) -> None:
    chunk = make_chunk(WHOLE, device)
    plain = in_float32(chunk)
    for of, kernel in ((chunk, Kernel.TRITON), (plain, Kernel.REFERENCE)):
        shape = replace(WHOLE.shape, dtype=of.out.dtype)
        chosen = (
            WHOLE.vertical_slash(kernel)
            if method == "vertical_slash"
            else Block(BlockSettings(share=0.9, long_from=0), kernel)
        )
        state = replace(make_state(WHOLE, WHOLE.vertical_slash(kernel), device), buffers=chosen.scratch(shape, device))
        prefill(of, chosen, replace(state, budgets=chosen.budgets(WHOLE.num_qo_heads, device)))
    # A few groups or columns at the edge of what is kept may differ.
    assert (chunk.out.float() - plain.out).norm() / plain.out.norm() < 0.02


# What is stored and what is taken


def test_what_the_cache_cannot_hold_ends_at_its_largest_number() -> None:
    x = torch.tensor([1e6, -1e6, 3.0, 0.0])[:, None, None]
    assert to_stored(x, torch.tensor([2.0])).flatten().tolist() == [448.0, -448.0, 1.5, 0.0]


@every_case
def test_the_cuda_library_takes_what_it_promises_in_fp8(case: Case) -> None:
    chunk = make_chunk(case, torch.device("cpu"))
    promised = case.has_fp8_q and case.head_dim in cuda.library.SUPPORTED_HEAD_DIMS
    assert cuda.attend.supports(chunk) is promised
    assert cuda.masses.supports(chunk, case.dtype, 16) is promised
    assert cuda.masses.supports(chunk, FP8, 16) is (promised and case.head_dim == 128)
    assert cuda.probe.supports(chunk, 64, 0) is (promised and case.head_dim == 128)
    assert cuda.probe.supports_held_out(chunk) is (promised and case.head_dim == 128)


@pytest.mark.parametrize(("elements", "is_taken"), [(16, True), (8, False)])
def test_rows_in_fp8_that_cannot_be_copied_in_pieces_go_to_triton(elements: int, is_taken: bool) -> None:
    chunk = make_chunk(WHOLE, torch.device("cpu"))
    q = chunk.q.view(torch.uint8)
    wider = torch.cat([q, q[..., :elements]], dim=-1).view(FP8)[..., : chunk.head_dim]
    assert cuda.attend.supports(replace(chunk, q=wider)) is is_taken
    assert cuda.masses.supports(replace(chunk, q=wider), FP8, 16) is is_taken
    assert cuda.probe.supports_held_out(replace(chunk, q=wider)) is is_taken


def test_a_cache_in_fp8_under_other_queries_is_left_to_triton(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in FP8_CASES if not case.has_fp8_q)
    chunk = make_chunk(case, device)
    launched: list[str] = []
    monkeypatch.setattr(cuda.library, "launch", lambda name, *_: launched.append(name))
    state = make_state(case, case.vertical_slash(Kernel.CUDA), chunk.q.device)
    prefill(chunk, case.vertical_slash(Kernel.CUDA), state)
    method = Block(BlockSettings(rows_per_half=16), Kernel.CUDA)
    method.choose(chunk, method.budgets(case.num_qo_heads, chunk.q.device), method.scratch(case.shape, chunk.q.device))
    assert chunk.out.isfinite().all()
    assert launched == ["minference_select_groups"], "it reads masses, and nothing of the cache"


def scaled(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("of_chunk", "of_kv", "fault"),
    [
        ({"q_scale": None}, {}, "q is torch.float8_e4m3fn without a scale"),
        ({}, {"k_scale": None}, "k is torch.float8_e4m3fn without a scale"),
        ({}, {"v_scale": None}, "v is torch.float8_e4m3fn without a scale"),
        ({"q_scale": scaled(3)}, {}, "q_scale must be float32, one for each of 2 KV heads"),
        ({"q_scale": scaled(2, dtype=torch.float16)}, {}, "q_scale must be float32"),
        ({}, {"v_scale": scaled(2, 1)}, "v_scale must be float32, one for each of 2 KV heads"),
    ],
)
def test_scales_that_a_kernel_would_read_wrongly_are_refused(
    of_chunk: dict[str, Any], of_kv: dict[str, Any], fault: str
) -> None:
    chunk = make_chunk(WHOLE, torch.device("cpu"))
    with pytest.raises(ValueError, match=fault):
        replace(chunk, kv=chunk.kv._replace(**of_kv), **of_chunk)


def test_fp8_elsewhere_than_in_a_cache_is_refused() -> None:
    plain, chunk = (make_chunk(case, torch.device("cpu")) for case in (Case(""), WHOLE))
    with pytest.raises(ValueError, match="under FP8 queries k must be"):
        replace(plain, q=plain.q.to(FP8), q_scale=scaled(2))
    with pytest.raises(ValueError, match=r"q is torch\.float16 with a scale"):
        replace(plain, q_scale=scaled(2))
    with pytest.raises(ValueError, match="and out not"):
        replace(chunk, out=chunk.out.to(FP8))
