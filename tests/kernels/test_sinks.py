# SPDX-License-Identifier: Apache-2.0
"""Learned sinks, a score per head that joins the softmax of the head's rows: each kernel against its plain-torch twin,
and the twins against a softmax over one key more.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from minference_vllm import compat, ops, reference
from minference_vllm.attention import Guard, LayerState, prefill
from minference_vllm.chunk import Chunk
from minference_vllm.index import HeadIndex
from minference_vllm.kernels import cuda
from minference_vllm.methods import Method
from minference_vllm.methods.block import Block, BlockSettings
from minference_vllm.ops import Kernel
from minference_vllm.recall import Floors
from minference_vllm.reference.dense import dense
from minference_vllm.reference.pages import gather
from minference_vllm.scratch import AttendBuffers, RecallBuffers, RecallTotals
from tests.kernels.cases import SINK_CASES, Case, make_chunk
from tests.kernels.checks import assert_close, attend_with, check_attend, check_bands
from tests.kernels.indexes import tile_index_of, tile_mask_of, tiles_in_turn
from tests.kernels.recalls import check_heads

every_case = pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in SINK_CASES])
every_kernel = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(Kernel.TRITON, id="triton"),
        pytest.param(Kernel.CUDA, id="cuda", marks=[pytest.mark.gpu, pytest.mark.hopper]),
    ],
)
BF16 = torch.bfloat16
PLAIN = Case("", num_rows=70, context_len=200, dtype=torch.float32, has_sinks=True)
SMALL = Case("", num_rows=20, context_len=120, num_qo_heads=2, num_kv_heads=1, has_fp32_sinks=True)
EXACT = dict(rtol=1e-4, atol=1e-5)  # float32 compared with float64


def without_sinks(chunk: Chunk) -> Chunk:
    return replace(chunk, sinks=None, out=torch.full_like(chunk.out, torch.nan))


def attended(chunk: Chunk, kernel: Kernel) -> AttendBuffers:
    """All heads attend to all keys."""
    everyone = torch.arange(chunk.num_qo_heads, dtype=torch.int32, device=chunk.q.device)
    number = torch.tensor([chunk.num_qo_heads], dtype=torch.int32, device=chunk.q.device)
    buffers = AttendBuffers.allocate(chunk.num_qo_heads, chunk.num_rows, chunk.q.device)
    ops.attend(chunk, HeadIndex(everyone, number), buffers, kernel)
    return buffers


@every_case
@every_kernel
def test_attend_to_bands_and_columns(case: Case, kernel: Kernel, device: torch.device) -> None:
    check_bands(case, kernel, device)


@every_case
@every_kernel
def test_attend_to_groups(case: Case, kernel: Kernel, device: torch.device) -> None:
    index = tile_index_of(tiles_in_turn(case.num_rows), case, device)
    check_attend(attend_with(kernel), make_chunk(case, device), index)


@every_case
@every_kernel
def test_attend_for_the_heads_of_the_guard(case: Case, kernel: Kernel, device: torch.device) -> None:
    check_heads(kernel, case, device)


# The twins


def one_key_more(chunk: Chunk, mask: torch.Tensor) -> torch.Tensor:
    """Attention over the keys of a mask, [num_qo_heads, num_rows, seq_len], and one more: its score is the head's sink,
    its value zero.
    """
    keys, values = gather(chunk.kv, chunk.seq_len)
    keys, values = (x.repeat_interleave(chunk.group_size, 0).double() for x in (keys, values))
    scores = chunk.q.transpose(0, 1).double() @ keys.transpose(1, 2) * chunk.scale
    sinks = chunk.sinks[:, None, None].expand(-1, chunk.num_rows, 1)
    scores = torch.cat([scores.masked_fill(~mask, -torch.inf), sinks], 2)
    values = torch.cat([values, torch.zeros_like(values[:, :1])], 1)
    return (scores.softmax(-1) @ values).transpose(0, 1)


def test_a_sink_is_one_key_more_without_a_value(device: torch.device) -> None:
    chunk, tiles = make_chunk(PLAIN, device), tiles_in_turn(0)
    buffers = AttendBuffers.allocate(PLAIN.num_qo_heads, PLAIN.num_rows, device)
    reference.attend(chunk, tile_index_of(tiles, PLAIN, device), buffers)
    expected = one_key_more(chunk, tile_mask_of(tiles, PLAIN).to(device))
    torch.testing.assert_close(chunk.out.double(), expected, **EXACT)


def test_dense_attention_takes_sinks_as_sparse_attention_does(device: torch.device) -> None:
    chunk = make_chunk(PLAIN, device)
    dense(chunk.q, chunk.kv, chunk.context_len, chunk.scale, chunk.out, sinks=chunk.sinks)
    positions = torch.arange(chunk.context_len, chunk.seq_len, device=device)
    causal = torch.arange(chunk.seq_len, device=device) <= positions[:, None]
    expected = one_key_more(chunk, causal.expand(chunk.num_qo_heads, -1, -1))
    torch.testing.assert_close(chunk.out.double(), expected, **EXACT)


@pytest.mark.gpu
@pytest.mark.hopper
@pytest.mark.parametrize("kernel", [Kernel.TRITON, Kernel.CUDA])
def test_sinks_are_what_flash_attention_makes_of_them(kernel: Kernel, device: torch.device) -> None:
    case = Case("", num_rows=900, context_len=1100, num_qo_heads=8, num_kv_heads=1, dtype=BF16, has_sinks=True)
    chunk = make_chunk(case, device)
    for of_cache in (chunk.kv.k, chunk.kv.v):  # FlashAttention may multiply what lies past the last key
        of_cache.nan_to_num_(0, 0, 0)
    attended(chunk, kernel)
    table = chunk.kv.block_table[chunk.kv.row][None].clamp(max=len(chunk.kv.k) - 1)
    starts, length = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, case.num_rows], [case.seq_len]))
    expected = torch.empty_like(chunk.out)
    compat.flash_attention(case.head_dim)(
        q=chunk.q, k=chunk.kv.k.transpose(1, 2), v=chunk.kv.v.transpose(1, 2), out=expected, cu_seqlens_q=starts,
        max_seqlen_q=case.num_rows, seqused_k=length, max_seqlen_k=case.seq_len, softmax_scale=case.scale, causal=True,
        block_table=table, s_aux=chunk.sinks.clone(),
    )  # fmt: skip
    assert_close(chunk.out, expected)


# What sinks do to a row


@every_kernel
def test_a_sink_of_minus_infinity_is_none(kernel: Kernel, device: torch.device) -> None:
    chunk = make_chunk(SMALL, device)
    chunk.sinks.fill_(-torch.inf)
    plain = without_sinks(chunk)
    attended(chunk, kernel)
    attended(plain, kernel)
    torch.testing.assert_close(chunk.out, plain.out)


@every_kernel
def test_a_sink_above_all_keys_leaves_nothing_and_no_nan(kernel: Kernel, device: torch.device) -> None:
    chunk = make_chunk(SMALL, device)
    for sink in (80.0, 1e4):  # relative to a row's maximum, float32 can hold the exponential of 80 but not of 1e4
        chunk.sinks.fill_(sink)
        attended(chunk, kernel)
        assert (chunk.out == 0).all()


@every_kernel
def test_a_log_sum_exp_is_that_of_the_keys_alone(kernel: Kernel, device: torch.device) -> None:
    chunk = make_chunk(SMALL, device)
    torch.testing.assert_close(attended(chunk, kernel).lse, attended(without_sinks(chunk), kernel).lse)


@every_kernel
@pytest.mark.parametrize("method", ["block", "vertical_slash"])
def test_keys_and_recall_are_those_of_the_keys_alone(method: str, kernel: Kernel, device: torch.device) -> None:
    case = Case("", num_rows=40, context_len=200, num_qo_heads=2, vertical_size=10, slash_size=16, has_sinks=True)
    chunk = make_chunk(case, device)
    chunk.q.copy_(3 * chunk.q[:1])  # all rows look at the same few keys
    bands: Method = case.vertical_slash(kernel)
    groups = Block(BlockSettings(share=0.5, sink_tokens=16, local_tokens=16), kernel)
    chosen = bands if method == "vertical_slash" else groups
    recalls, kept = [], []
    for of in (chunk, without_sinks(chunk)):
        guard = Guard(
            Floors(0.0, 0.0),
            RecallBuffers.allocate(case.num_qo_heads, device),
            RecallTotals.allocate(1, case.num_qo_heads, device),
        )
        attend = AttendBuffers.allocate(case.num_qo_heads, case.num_rows, device)
        budgets = chosen.budgets(case.num_qo_heads, device)
        prefill(of, chosen, LayerState(0, budgets, chosen.scratch(case.shape, device), attend, guard))
        recalls.append(guard.buffers.recall)
        kept.append(attend.kept_pairs.item())
    assert kept[0] == kept[1]
    torch.testing.assert_close(*recalls)
    assert recalls[0].min() < 0.999, "a head that keeps everything shows nothing"


# What is taken


@pytest.mark.parametrize(
    ("dtype", "sinks_dtype", "takes"),
    [
        (BF16, BF16, True),
        (torch.float16, torch.float16, True),
        (BF16, torch.float32, True),
        (BF16, torch.float16, False),
        (torch.float16, BF16, False),
    ],
)
def test_the_cuda_library_takes_sinks_of_the_outputs_type_and_float32(
    dtype: torch.dtype, sinks_dtype: torch.dtype, takes: bool
) -> None:
    chunk = make_chunk(replace(PLAIN, dtype=dtype), torch.device("cpu"))
    assert cuda.attend.supports(replace(chunk, sinks=chunk.sinks.to(sinks_dtype))) is takes


@pytest.mark.parametrize(
    "sinks",
    [torch.zeros(3), torch.zeros(4, 1), torch.zeros(4, dtype=torch.float64), torch.zeros(8)[::2]],
    ids=["too few", "of two dimensions", "float64", "strided"],
)
def test_sinks_that_a_kernel_would_read_wrongly_are_refused(sinks: torch.Tensor) -> None:
    chunk = make_chunk(PLAIN, torch.device("cpu"))
    changes: dict[str, Any] = {"sinks": sinks}
    with pytest.raises(ValueError, match="sinks must be one number for each of 4 query heads"):
        replace(chunk, **changes)


def test_what_the_cuda_library_does_not_take_triton_does(device: torch.device) -> None:
    chunk = make_chunk(replace(SMALL, dtype=BF16), device)
    chunk = replace(chunk, sinks=chunk.sinks.half())
    attended(chunk, Kernel.CUDA)
    of_twin = replace(chunk, out=torch.empty_like(chunk.out))
    attended(of_twin, Kernel.REFERENCE)
    assert_close(chunk.out, of_twin.out)
