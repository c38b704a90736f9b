# SPDX-License-Identifier: Apache-2.0
"""What must hold of sparse prefill whatever the numbers are, for the kernels and for their plain-torch twins."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from minference_vllm import attention, ops
from minference_vllm.attention import LayerState
from minference_vllm.chunk import Chunk, PagedKV
from minference_vllm.methods import Method
from minference_vllm.ops import Kernel
from minference_vllm.reference.pages import gather
from minference_vllm.scratch import AttendBuffers
from tests.kernels.cases import Case, make_cache, make_chunk, make_queries, make_state
from tests.kernels.checks import assert_close
from tests.kernels.indexes import NOTHING, Kept, index_of, mask_of

EVERYTHING = 10_000
# Small, since an interpreted kernel takes seconds; still three tiles, the first and last of them partial.
SPARSE = Case("", num_rows=170, context_len=110, num_qo_heads=2, num_kv_heads=1, vertical_size=8, slash_size=17)
FULL = replace(SPARSE, vertical_size=EVERYTHING, slash_size=EVERYTHING)


class Result(NamedTuple):
    out: torch.Tensor
    lse: torch.Tensor
    kept_pairs: int


KERNELS = [Kernel.REFERENCE, Kernel.TRITON, pytest.param(Kernel.CUDA, marks=[pytest.mark.gpu, pytest.mark.hopper])]


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return request.param


class Engine(NamedTuple):
    """Kernels, and the method that chooses."""

    kernel: Kernel
    make_method: Callable[[Case, Kernel], Method]

    def method(self, case: Case) -> Method:
        return self.make_method(case, self.kernel)


@pytest.fixture(params=[Case.vertical_slash, Case.block], ids=["vertical_slash", "block"])
def engine(request: pytest.FixtureRequest, kernel: Kernel) -> Engine:
    return Engine(kernel, request.param)


def prefill(
    engine: Engine,
    case: Case,
    q: torch.Tensor,
    kv: PagedKV,
    state: LayerState | None = None,
    out: torch.Tensor | None = None,
) -> Result:
    """Sparse prefill of one chunk; `case` gives its context and budget."""
    method = engine.method(case)
    state = make_state(case, method, q.device) if state is None else state
    out = torch.full_like(q, torch.nan) if out is None else out
    kept_before = state.attend.kept_pairs.item()
    chunk = Chunk(q, out, kv, case.context_len, case.scale, may_end_prompt=False)
    attention.prefill(chunk, method, state)
    kept_pairs = int(state.attend.kept_pairs.item() - kept_before)
    return Result(out.clone(), state.attend.lse[:, : case.num_rows].clone(), kept_pairs)


def dense(case: Case, q: torch.Tensor, kv: PagedKV, mask: torch.Tensor | None = None) -> torch.Tensor:
    """torch's own attention in float32 over the gathered keys; causal unless a mask [heads, rows, keys] is given."""
    keys, values = gather(kv, case.seq_len)
    if mask is None:
        mask = torch.ones(case.num_rows, case.seq_len, dtype=torch.bool, device=q.device).tril(case.context_len)
    q, keys, values = q.transpose(0, 1)[None].float(), keys[None].float(), values[None].float()
    return scaled_dot_product_attention(q, keys, values, mask, scale=case.scale, enable_gqa=True)[0].transpose(0, 1)


def assert_equal(actual: Result, expected: Result) -> None:
    """Bit for bit."""
    assert torch.equal(actual.out, expected.out)
    assert torch.equal(actual.lse, expected.lse)
    assert actual.kept_pairs == expected.kept_pairs


def causal_pairs(case: Case) -> int:
    return case.num_qo_heads * (case.num_rows * case.context_len + case.num_rows * (case.num_rows + 1) // 2)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(FULL, id="group of two"),
        pytest.param(replace(FULL, num_kv_heads=2, page_size=48, layout="HND", dtype=torch.bfloat16), id="bf16, HND"),
        pytest.param(replace(FULL, head_dim=128, num_rows=5, context_len=250, probe_rows="both"), id="few rows"),
    ],
)
def test_a_full_budget_is_dense_attention(engine: Engine, case: Case, device: torch.device) -> None:
    q, kv = make_queries(case, device), make_cache(case, device)
    result = prefill(engine, case, q, kv)
    assert_close(result.out, dense(case, q, kv))
    assert result.kept_pairs == causal_pairs(case)


def hide_keys_from(kv: PagedKV, first: int) -> PagedKV:
    """A copy of the cache as it is before the keys from position `first` on are written."""
    cache = torch.cat([kv.k, kv.v], dim=-1)
    pages = kv.block_table[kv.row]
    for position in range(first, int((pages < len(cache)).sum()) * kv.page_size):
        cache[pages[position // kv.page_size], :, position % kv.page_size] = torch.nan
    k, v = cache.split(kv.k.shape[3], dim=-1)
    return PagedKV(k, v, kv.block_table, kv.row)


@pytest.mark.parametrize("chunks", [(128, 72), (1, 129, 70), (199, 1)], ids=str)
def test_a_full_budget_does_not_depend_on_the_chunks(
    engine: Engine, chunks: tuple[int, ...], device: torch.device
) -> None:
    whole = replace(FULL, num_rows=sum(chunks), context_len=0)
    q, kv = make_queries(whole, device), make_cache(whole, device)
    state = make_state(whole, engine.method(whole), device)
    parts = []
    start = 0
    for rows in chunks:
        case = replace(whole, num_rows=rows, context_len=start)
        parts.append(prefill(engine, case, q[start : start + rows], hide_keys_from(kv, start + rows), state))
        start += rows
    unchunked = prefill(engine, whole, q, kv, state)
    assert_close(torch.cat([part.out for part in parts]), unchunked.out)
    torch.testing.assert_close(torch.cat([part.lse for part in parts], 1), unchunked.lse, rtol=1e-4, atol=1e-4)
    assert sum(part.kept_pairs for part in parts) == unchunked.kept_pairs


def test_tensor_parallel_shards_are_slices_of_the_whole(engine: Engine, device: torch.device) -> None:
    whole = replace(SPARSE, num_qo_heads=4, num_kv_heads=2, num_rows=90)
    q, kv = make_queries(whole, device), make_cache(whole, device)
    expected = prefill(engine, whole, q, kv)
    assert expected.kept_pairs < causal_pairs(whole)
    kept_pairs = 0
    # Two ranks with a KV head each; then one of four ranks, each KV head being on two of them.
    for qo_heads, kv_heads in ((slice(0, 2), slice(0, 1)), (slice(2, 4), slice(1, 2)), (slice(1, 2), slice(0, 1))):
        num_heads = qo_heads.stop - qo_heads.start
        case = replace(whole, num_qo_heads=num_heads, num_kv_heads=1)
        shard = prefill(engine, case, q[:, qo_heads], kv._replace(k=kv.k[:, kv_heads], v=kv.v[:, kv_heads]))
        assert torch.equal(shard.out, expected.out[:, qo_heads])
        assert torch.equal(shard.lse, expected.lse[qo_heads])
        kept_pairs += shard.kept_pairs if num_heads == 2 else 0
    assert kept_pairs == expected.kept_pairs


@pytest.mark.parametrize(
    "heads",
    [
        pytest.param([NOTHING, NOTHING], id="nothing but each tile's own keys"),
        pytest.param([Kept([1, 2, 9], [], [], []), NOTHING], id="no columns"),
        pytest.param([Kept([], [], [], [0, 5, 127, 130, 255, 261]), NOTHING], id="columns before, in and after a tile"),
        pytest.param([Kept([], [], [], [3]), Kept([4, 8, 16], [], [], [])], id="bands of a head, columns of the other"),
        pytest.param([Kept([], [1, 8, 16], [], []), Kept([], [], [2, 9], [])], id="bands of one half"),
        pytest.param([Kept([2, 7, 8], [1, 10], [3, 4, 16], []), NOTHING], id="bands of every kind"),
        pytest.param(
            [Kept([8], [16], [6], [0, 3, 15, 17, 40]), Kept([], [1], [7, 15], [16, 127, 128])],
            id="columns that a band holds for one half or for both",
        ),
        pytest.param([Kept(list(range(1, 17)), [], [], []), NOTHING], id="whole steps of bands"),
    ],
)
def test_attention_covers_what_the_index_lists_and_nothing_else(
    kernel: Kernel, heads: list[Kept], device: torch.device
) -> None:
    chunk = make_chunk(SPARSE, device)
    buffers = AttendBuffers.allocate(SPARSE.num_qo_heads, SPARSE.num_rows, device)
    ops.attend(chunk, index_of(heads, SPARSE, device), buffers, kernel)
    mask = mask_of(heads, SPARSE).to(device)
    assert_close(chunk.out, dense(SPARSE, chunk.q, chunk.kv, mask))
    assert buffers.kept_pairs.item() == mask.sum()


def share_cache(caches: list[PagedKV]) -> list[PagedKV]:
    """The same requests in one cache and one block table, their pages shuffled among each other."""
    generator = torch.Generator().manual_seed(7)
    cache = torch.cat([torch.cat([kv.k, kv.v], dim=-1) for kv in caches])
    place = torch.randperm(len(cache), generator=generator).to(cache.device)
    shuffled = torch.empty_like(cache)
    shuffled[place] = cache
    width = max(kv.block_table.shape[1] for kv in caches)
    table = torch.full((len(caches), width), 2**30, dtype=torch.int32, device=cache.device)
    first = 0
    for row, kv in enumerate(caches):
        pages = kv.block_table[kv.row]
        pages = pages[pages < len(kv.k)].long()
        table[row, : len(pages)] = place[first + pages].to(torch.int32)
        first += len(kv.k)
    k, v = shuffled.split(caches[0].k.shape[3], dim=-1)
    return [PagedKV(k, v, table, row) for row in range(len(caches))]


def test_prompts_of_one_batch_come_out_as_each_alone(engine: Engine, device: torch.device) -> None:
    # Long, short, long: what one prompt leaves in scratch memory must not affect the next.
    cases = [SPARSE, replace(SPARSE, num_rows=70, context_len=130), replace(SPARSE, num_rows=200, context_len=80)]
    queries = [make_queries(case, device, seed) for seed, case in enumerate(cases)]
    caches = [make_cache(case, device, seed + 10) for seed, case in enumerate(cases)]
    state = make_state(replace(SPARSE, num_rows=300), engine.method(SPARSE), device)
    for case, q, kv, shared in zip(cases, queries, caches, share_cache(caches), strict=True):
        alone = prefill(engine, case, q, kv)
        assert alone.kept_pairs < causal_pairs(case)
        assert_equal(prefill(engine, case, q, shared, state), alone)


def test_the_order_of_pages_changes_nothing(engine: Engine, device: torch.device) -> None:
    q, kv = make_queries(SPARSE, device), make_cache(SPARSE, device)
    (permuted,) = share_cache([kv])
    assert not torch.equal(permuted.block_table[0], kv.block_table[1])
    assert_equal(prefill(engine, SPARSE, q, permuted), prefill(engine, SPARSE, q, kv))


def far_apart(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """A copy with a stride in `dim` so large that its last index lies past 2^31 elements. Touches little memory.

    It starts in the middle of its storage: an offset that wraps around to -2^31 reads wrong numbers and does not crash.
    """
    stride = (2**31 // (tensor.shape[dim] - 1) + 16) // 16 * 16
    strides, rest = [0] * tensor.dim(), 1
    for other in reversed([d for d in range(tensor.dim()) if d != dim]):
        strides[other] = rest
        rest *= tensor.shape[other]
    strides[dim] = stride
    try:
        storage = torch.empty(2**32 + 2**24, dtype=tensor.dtype, device=tensor.device)
    except RuntimeError as error:
        pytest.skip(f"needs 8 GiB of address space: {error}")
    view = storage.as_strided(tensor.shape, strides, 2**31)
    assert (tensor.shape[dim] - 1) * stride >= 2**31
    return view.copy_(tensor)


@pytest.mark.parametrize(("what", "dim"), [("pages", 0), ("kv heads", 1), ("rows", 0)])
def test_offsets_past_2_to_the_31(engine: Engine, what: str, dim: int, device: torch.device) -> None:
    case = replace(SPARSE, num_rows=70, num_qo_heads=3, num_kv_heads=3)
    q, kv = make_queries(case, device), make_cache(case, device)
    expected = prefill(engine, case, q, kv)
    if what == "rows":
        q, out = far_apart(q, 0), far_apart(torch.full_like(q, torch.nan), 0)
        assert_equal(prefill(engine, case, q, kv, out=out), expected)
        return
    assert (kv.block_table[kv.row] == len(kv.k) - 1).any(), "the last page is the one that lies far off"
    cache = far_apart(torch.cat([kv.k, kv.v], dim=-1), dim)
    k, v = cache.split(case.head_dim, dim=-1)
    assert_equal(prefill(engine, case, q, PagedKV(k, v, kv.block_table, kv.row)), expected)


@pytest.mark.parametrize("stride", [0, 1, 2**40])
def test_the_stride_of_a_single_kv_head_means_nothing(engine: Engine, stride: int, device: torch.device) -> None:
    case = replace(SPARSE, num_rows=70)
    q, kv = make_queries(case, device), make_cache(case, device)
    expected = prefill(engine, case, q, kv)

    def degenerate(half: torch.Tensor) -> torch.Tensor:
        strides = (half.stride(0), stride, half.stride(2), 1)
        return half.as_strided(half.shape, strides, half.storage_offset())

    odd = PagedKV(degenerate(kv.k), degenerate(kv.v), kv.block_table, kv.row)
    assert odd.k.stride(1) == stride
    assert_equal(prefill(engine, case, q, odd), expected)
