# SPDX-License-Identifier: Apache-2.0
"""Columns and diagonals that hold a share of the attention: the kernel against its twin, and what must hold of them."""

import math
from dataclasses import replace

import pytest
import torch

from minference_vllm import ops, reference
from minference_vllm.chunk import Chunk
from minference_vllm.index import BAND, HALF, TILE, BandIndex
from minference_vllm.kernels import triton
from minference_vllm.methods import MAX_TOKENS
from minference_vllm.ops import Kernel
from minference_vllm.reference.attend import kept_before
from minference_vllm.reference.pages import gather
from minference_vllm.reference.probe import probe_rows
from minference_vllm.reference.select import weights
from minference_vllm.reference.share import largest_masses
from minference_vllm.scratch import SelectBuffers
from tests.kernels.cases import Case, make_chunk, make_state

SHARES = [1e-6, 0.5, 0.9, 1.0]
CASE = Case("", num_rows=200, context_len=700, num_qo_heads=2, num_kv_heads=1, vertical_size=40, slash_size=120)
UNBOUNDED = dict(vertical_size=MAX_TOKENS, slash_size=MAX_TOKENS)
kernels = pytest.mark.parametrize(
    "kernel",
    [Kernel.REFERENCE, Kernel.TRITON, pytest.param(Kernel.CUDA, marks=[pytest.mark.gpu, pytest.mark.hopper])],
)


def make_masses(kind: str, length: int, device: torch.device) -> torch.Tensor:
    """A row of masses for each of SHARES, and past its end masses that must not count."""
    generator = torch.Generator().manual_seed(length)
    shape = (len(SHARES), length)
    mass = {
        "zeros": torch.zeros(shape),
        "one entry": torch.zeros(shape).index_fill_(1, torch.tensor([length - 1]), 2**30),
        "equal": torch.full(shape, 77),
        "units": torch.randint(0, 4, shape, generator=generator),
        "any": torch.randint(0, 2**30 + 1, shape, generator=generator),
        "steep": torch.rand(shape, generator=generator).pow(30) * 2**26,
    }[kind]
    beyond = torch.full((len(SHARES), 50), 2**30)
    return torch.cat([mass.to(torch.int32), beyond.to(torch.int32)], 1).to(device)


def check_sizes(mass: torch.Tensor, forced: int, keep: list[int]) -> None:
    """`keep` entries hold the share, and without the lightest of them the others would not."""
    for row, share, size in zip(mass.tolist(), torch.tensor(SHARES).tolist(), keep, strict=True):
        weight = weights(torch.tensor([row], dtype=torch.int32), torch.tensor([forced]))[0].tolist()
        entries = sorted(range(len(row)), key=lambda entry: (-weight[entry], entry))
        kept, dropped = entries[:size], entries[size:]
        allowed = (1 - share) * sum(row)
        assert sum(row[entry] for entry in dropped) <= allowed
        assert {*range(min(forced, len(row)))} <= {*kept}
        free = [entry for entry in kept if entry >= forced]
        assert all(row[entry] for entry in free), "no entry without mass is kept but by force"
        assert share < 1 or not any(row[entry] for entry in dropped)
        if free:
            lightest = weight[free[-1]]
            assert all(weight[entry] < lightest for entry in dropped), "of one weight, all or none"
            fewer = sum(row[entry] for entry in entries if weight[entry] <= lightest)
            assert fewer * (1 + 2**-6) > allowed, "fewer would have done"


@pytest.mark.parametrize(
    ("length", "forced"), [(1, 0), (1, 1), (63, 5), (500, 600), (4096, 30), (4097, 0), (9001, 100)]
)
@pytest.mark.parametrize("kind", ["zeros", "one entry", "equal", "units", "any", "steep"])
def test_the_heaviest_entries_hold_the_share(kind: str, length: int, forced: int, device: torch.device) -> None:
    mass, share = make_masses(kind, length, device), torch.tensor(SHARES, device=device)
    first = torch.tensor(forced, dtype=torch.int32, device=device).expand(len(SHARES))
    for max_keep in (MAX_TOKENS, 12):
        sizes = []
        for share_sizes in (reference.share_sizes, triton.share_sizes):
            buffers = SelectBuffers.allocate(len(SHARES), device)
            for left_over in (buffers.histogram, buffers.counts, buffers.totals):
                left_over.fill_(99)
            keep = torch.full((len(SHARES), 2), -5, dtype=torch.int32, device=device)
            share_sizes(mass, length, share, first, max_keep, keep[:, 1], buffers)
            assert (keep[:, 0] == -5).all()
            sizes.append(keep[:, 1].tolist())
        assert sizes[1] == sizes[0]
        if max_keep == MAX_TOKENS:
            check_sizes(mass[:, :length].cpu(), forced, sizes[1])
            wanted = sizes[1]
        assert sizes[1] == [min(size, max_keep) for size in wanted]


def test_rows_of_known_sizes(device: torch.device) -> None:
    def sizes(row: list[int], forced: int, shares: list[float]) -> list[int]:
        mass = torch.tensor([row] * len(shares), dtype=torch.int32, device=device)
        keep = torch.zeros(len(shares), dtype=torch.int32, device=device)
        share = torch.tensor(shares, device=device)
        first = torch.full_like(keep, forced)
        triton.share_sizes(mass, len(row), share, first, 99, keep, SelectBuffers.allocate(len(shares), device))
        return keep.tolist()

    row = [0, 1, 64, 16, 8, 8, 2, 1]
    assert sizes(row, 0, [0.01, 0.63, 0.65, 0.79, 0.81, 0.95, 0.97, 1.0]) == [1, 1, 2, 2, 4, 4, 5, 7]
    # The first three are kept by force and hold 65 of 100, so the others need to hold only what is missing.
    assert sizes(row, 3, [0.01, 0.64, 0.66, 0.8, 0.82, 1.0]) == [3, 3, 4, 4, 6, 8]


def test_the_longest_row_overflows_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":  # the interpreter's time grows with the number of steps
        monkeypatch.setattr("minference_vllm.kernels.triton.share.BLOCK", 2**20)
    mass = torch.full((1, MAX_TOKENS), 2**30, dtype=torch.int32, device=device)
    mass[:, : 2**22] -= 2**28
    keep = torch.zeros(1, dtype=torch.int32, device=device)
    share, none = torch.tensor([0.5], device=device), torch.zeros_like(keep)
    triton.share_sizes(mass, MAX_TOKENS, share, none, MAX_TOKENS, keep, SelectBuffers.allocate(1, device))
    assert keep.tolist() == [MAX_TOKENS - 2**22]


def test_no_mass_is_larger_than_the_largest_of_its_weight() -> None:
    largest = largest_masses(torch.device("cpu"))

    def weight(mass: torch.Tensor) -> torch.Tensor:
        return weights(mass.int()[None], torch.zeros(1))[0].long()

    every = torch.arange(2**16)
    some = (2 ** torch.linspace(16, 30, 2**16, dtype=torch.float64)).long()
    near = largest[largest < 2**30]
    for mass in (every, some, near, near + 1):
        assert (largest[weight(mass)] >= mass).all()
    exact = largest[largest < 2**24]
    assert torch.equal(largest[weight(exact)], exact)
    assert (weight(exact + 1) > weight(exact)).all()


def test_sizes_of_more_entries_than_there_are_are_refused() -> None:
    mass, keep = torch.zeros(1, 40, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"1 \.\. 40"):
        ops.share_sizes(mass, 41, torch.ones(1), 0, 9, keep, SelectBuffers.allocate(1, mass.device), Kernel.TRITON)


# The method


def choose(
    chunk: Chunk, case: Case, kernel: Kernel, share: float | list[float] | None, **settings: object
) -> BandIndex:
    """The index of a chunk, by one share for all heads or one for each."""
    given = share[0] if isinstance(share, list) else share
    method = case.vertical_slash(kernel, share=given, **settings)
    state = make_state(case, method, chunk.q.device)
    if isinstance(share, list):
        state.budgets.copy_(torch.tensor(share)[:, None])
    return method.choose(chunk, state.budgets, state.buffers)


def held(chunk: Chunk, case: Case, index: BandIndex) -> torch.Tensor:
    """[num_qo_heads] share of the probe rows' attention that lies on kept keys."""
    counts = case.vertical_slash(Kernel.REFERENCE).settings.probe_counts
    rows = probe_rows(chunk.num_rows, *counts, chunk.q.device).tolist()
    keys = gather(chunk.kv, chunk.seq_len)[0].double()
    shares = torch.zeros(chunk.num_qo_heads, dtype=torch.float64)
    for head in range(chunk.num_qo_heads):
        for row in rows:
            position = chunk.context_len + row
            visible = keys[head // chunk.group_size, : position + 1]
            attention = (visible @ chunk.q[row, head].double() * chunk.scale).softmax(0).cpu()
            tile, offset = divmod(position, TILE)
            earlier = kept_before(index, head, tile, offset // HALF).cpu()
            shares[head] += attention[earlier].sum() + attention[tile * TILE :].sum()
    return shares / len(rows)


@kernels
@pytest.mark.parametrize("probe", ["last", "spread", "both"])
@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param({}, id="both"),
        pytest.param({"slash_size": 1, "local_tokens": 1}, id="columns alone"),
        pytest.param({"vertical_size": 1}, id="diagonals alone"),
    ],
)
def test_what_is_kept_holds_the_share(
    kernel: Kernel, probe: str, bounds: dict[str, object], device: torch.device
) -> None:
    case = replace(CASE, probe_rows=probe)
    chunk = make_chunk(case, device)
    index = choose(chunk, case, kernel, [0.4, 0.8], **{**UNBOUNDED, **bounds})
    shares = held(chunk, case, index)
    assert (shares > torch.tensor([0.4, 0.8]) - 1e-3).all()
    if "slash_size" in bounds:
        # Not much more is kept than asked for, apart from what a tile's own keys hold.
        own = held(chunk, case, choose(chunk, case, kernel, None, vertical_size=1, slash_size=1, local_tokens=1))
        assert (shares < torch.tensor([0.4, 0.8]) + own + 0.05).all()


@kernels
def test_a_bound_cuts_what_the_share_wants(kernel: Kernel, device: torch.device) -> None:
    chunk = make_chunk(CASE, device)
    bounded, fixed = (choose(chunk, CASE, kernel, share) for share in (1.0, None))
    last = (chunk.seq_len - 1) // TILE
    assert bounded.columns.shape == fixed.columns.shape
    for name in ("columns", "columns_indptr", "bands_indptr"):
        assert torch.equal(getattr(bounded, name), getattr(fixed, name)), name
    assert torch.equal(bounded.band_halves, fixed.band_halves)
    assert bounded.columns_indptr[:, last].min() > 0


@kernels
def test_a_key_that_gets_all_attention_is_all_that_is_kept(kernel: Kernel, device: torch.device) -> None:
    chunk = make_chunk(CASE, device)
    chunk.q[:] = 1
    pages = chunk.kv.block_table[chunk.kv.row]
    chunk.kv.k[pages[: -(-CASE.seq_len // CASE.page_size)].long()] = 0
    chunk.kv.k[pages[5], :, 3] = 40
    index = choose(chunk, CASE, kernel, 0.99, **UNBOUNDED)
    last = (chunk.seq_len - 1) // TILE
    key = 5 * CASE.page_size + 3
    sinks = 4
    assert index.columns_indptr[:, last].tolist() == [sinks + 1] * CASE.num_qo_heads
    assert index.columns[:, : sinks + 1].tolist() == [[*range(sinks), key]] * CASE.num_qo_heads


@kernels
def test_a_distance_that_gets_all_attention_is_all_that_is_kept(kernel: Kernel, device: torch.device) -> None:
    chunk, distance = make_chunk(CASE, device), 301
    frequency = torch.rand(CASE.head_dim // 2, generator=torch.Generator().manual_seed(0)) * math.pi

    def turned(positions: torch.Tensor) -> torch.Tensor:
        """[len(positions), head_dim]: the product of two rows depends on their distance alone and is largest at 0."""
        angle = positions[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin()], 1).to(device, CASE.dtype)

    chunk.q[:] = 4 * turned(torch.arange(CASE.num_rows) + CASE.context_len - distance)[:, None]
    pages = chunk.kv.block_table[chunk.kv.row, : -(-CASE.seq_len // CASE.page_size)].long()
    keys = turned(torch.arange(len(pages) * CASE.page_size)).view(len(pages), 1, CASE.page_size, -1)
    chunk.kv.k[pages] = keys.expand(-1, CASE.num_kv_heads, -1, -1)
    index = choose(chunk, CASE, kernel, 0.99, vertical_size=4, slash_size=MAX_TOKENS, local_tokens=1)
    assert (held(chunk, CASE, index) > 0.99).all()
    last = (chunk.seq_len - 1) // TILE
    for half in range(2):
        kept = kept_before(index, 0, last, half).tolist()
        # The sinks, the keys just before the half, and those that its rows look at, with a band or two of slack.
        assert len(kept) <= 4 + HALF + 2 * BAND + HALF + 3 * BAND
        assert {*range(last * TILE + half * HALF - distance, last * TILE + half * HALF + HALF - distance)} <= {*kept}


@kernels
def test_the_whole_share_of_equal_keys_keeps_every_key(kernel: Kernel, device: torch.device) -> None:
    chunk = make_chunk(CASE, device)
    chunk.q[:] = 0
    index = choose(chunk, CASE, kernel, 1.0, **UNBOUNDED)
    for tile in range(1, math.ceil(chunk.seq_len / TILE)):
        for half in range(2):
            assert len(kept_before(index, 0, tile, half)) == tile * TILE
