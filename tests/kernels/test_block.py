# SPDX-License-Identifier: Apache-2.0
"""The groups that `block` keeps, each kernel against its plain-torch twin, and what must hold of them."""

from dataclasses import fields, replace

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import scaled_dot_product_attention

from minference_vllm import reference
from minference_vllm.chunk import Chunk
from minference_vllm.index import EVERY_GROUP, GROUP, GROUPS_PER_TILE, HALF, HALVES, TILE, TileIndex
from minference_vllm.kernels import triton
from minference_vllm.methods.block import Block, BlockSettings
from minference_vllm.methods.block_scratch import Shapes
from minference_vllm.ops import Kernel
from minference_vllm.reference.codes import ONE, add, weights
from minference_vllm.reference.groups import ROW, write_lists
from minference_vllm.reference.normalisers import NORMALISER_KEYS, PART
from minference_vllm.reference.pages import gather
from minference_vllm.scratch import MASS_CODES, AttendBuffers, ScratchShape
from tests.kernels.blocks import (
    BF16,
    LOCAL,
    LONG,
    SINKS,
    SPARSE,
    engines,
    kept_by_half,
    make_index,
    make_masses,
)  # fmt: skip
from tests.kernels.cases import Case, make_chunk
from tests.kernels.checks import assert_close


def assert_same_lists(actual: TileIndex, expected: TileIndex) -> None:
    assert torch.equal(actual.counts, expected.counts)
    assert torch.equal(actual.groups, expected.groups)


def all_codes(kind: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    codes = {
        "nothing": torch.zeros(shape),
        "equal": torch.full(shape, 130),
        "random": torch.randint(MASS_CODES, shape, generator=generator),
        "one group": torch.zeros(shape).index_fill_(2, torch.tensor([5]), 255),
        "falling": torch.arange(shape[2]).flip(0).clamp(max=255).expand(shape),
        "steep": torch.rand(shape, generator=generator).pow(8) * 200 + 40,
    }
    return codes[kind].to(torch.uint8)


SHARES = [0.02, 0.5, 0.9, 1.0, 1.0000002]


@pytest.mark.parametrize(
    ("kind", "num_rows", "context_len", "rows_per_half"),
    [(kind, 90, 400, 16) for kind in ("nothing", "equal", "random", "one group", "falling", "steep")]
    + [("random", 20, 200, 32), ("steep", 20, 130, 16), ("random", 1, 700, 32), ("random", 20, 0, 32)]
    + [("random", 90, 400, 32), ("steep", 90, 400, 32), ("steep", 90, 400, 64)],
    ids=str,
)
@pytest.mark.parametrize("by_tile", [False, True], ids=["by half", "by tile"])
def test_groups_that_hold_the_share(
    kind: str, num_rows: int, context_len: int, rows_per_half: int, by_tile: bool, device: torch.device
) -> None:
    heads = len(SHARES)
    chunk = make_chunk(Case("", num_rows, context_len, num_qo_heads=heads, num_kv_heads=1), device)
    masses = make_masses(chunk, heads, rows_per_half)
    masses.copy_(all_codes(kind, masses.shape, torch.Generator().manual_seed(3)))
    share = torch.tensor(SHARES, device=device)
    for max_kept in (masses.shape[2], 12):
        expected, actual = make_index(chunk, max_kept), make_index(chunk, max_kept)
        reference.select_groups(masses, chunk, share, rows_per_half, SINKS, LOCAL, LONG, by_tile, expected)
        triton.select_groups(masses.clone(), chunk, share, rows_per_half, SINKS, LOCAL, LONG, by_tile, actual)
        assert_same_lists(actual, expected)
        parts = masses.cpu()[:, : chunk.num_tiles * HALVES * rows_per_half // PART]
        check_kept(parts, rows_per_half, chunk, by_tile, actual)


def check_kept(masses: torch.Tensor, rows: int, chunk: Chunk, by_tile: bool, index: TileIndex) -> None:
    """Each half, or tile, keeps what is forced, drops what its share allows, and keeps no group that it may drop.

    Args:
        masses: [heads, parts, groups] uint8.
        rows: of a half.
    """
    for head, share in enumerate(SHARES):
        for tile in range(chunk.num_tiles):
            number = torch.arange((chunk.first_tile + tile) * GROUPS_PER_TILE)
            forced = (number < SINKS) | (number >= len(number) - LOCAL)
            every = index.counts[head, tile, 0] == EVERY_GROUP
            for half, kept in enumerate(kept_by_half(index, chunk, head, tile)):
                begin = (chunk.first_tile + tile) * TILE + half * HALF
                absent = begin + HALF <= chunk.context_len or begin >= chunk.seq_len
                choosing = [1 - half if absent else half]
                if by_tile:
                    last = begin - half * HALF + HALF >= chunk.seq_len
                    first = begin - half * HALF + HALF <= chunk.context_len
                    choosing = [int(first), int(not last)]
                of_halves = masses[head, :, : len(number)].unflatten(0, (-1, rows // PART))
                row = add(of_halves[[tile * HALVES + of for of in choosing]].flatten(0, 1))
                mass = weights(row) / ONE
                total = rows * len(choosing) * ROW / ONE + mass[NORMALISER_KEYS // GROUP :].sum()
                limit = (1 - share) ** 3 * total**3 * len(row) / max(len(row), LONG) ** 2
                assert kept[forced].all()
                assert share <= 1 or kept.all()
                assert share < 1 or kept[row > 0].all()
                assert kept.all() or mass[~kept].sum() ** 2 * mass[~kept].max() <= limit * (1 + 1e-6)
                free = kept & ~forced
                assert kept[row == MASS_CODES - 1].all(), "what may be more than its code says"
                if share <= 1 and free.any() and not every and row[free].min() < MASS_CODES - 1:
                    lightest = free & (row == row[free].min())
                    assert row[free].min() > 0
                    assert not (~kept & (row >= row[free].min())).any(), "of equal mass, all or none"
                    dropped = mass[~kept | lightest].sum()
                    assert dropped**2 * mass[lightest].max() > limit * (1 - 1e-6), "fewer would have done"


def test_each_head_gets_its_own_share(device: torch.device) -> None:
    chunk = make_chunk(SPARSE, device)
    masses = make_masses(chunk, 2)
    masses.fill_(90)
    index = make_index(chunk, masses.shape[2])
    triton.select_groups(masses, chunk, torch.tensor([1e-6, 1.0], device=device), 16, 0, 0, 0, False, index)
    assert index.counts[0, :-1].sum() == 0
    assert index.counts[1, :-1].sum(1).tolist() == [16, 24]


def test_no_length_overflows(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":  # the interpreter's time grows with the number of steps
        monkeypatch.setattr("minference_vllm.kernels.triton.groups.BLOCK", 2**17)
    # The last tile of 2^24 tokens; that many keys are not needed to choose groups by their masses.
    chunk = replace(make_chunk(Case("", num_rows=1, context_len=0, num_qo_heads=1, num_kv_heads=1), device))
    object.__setattr__(chunk, "context_len", 2**24 - 1)
    groups = (2**24 - TILE) // GROUP
    # Three quarters of the groups have a mass of 2^-17, together that of 6 rows. No sum exceeds that of the others.
    masses = torch.full((1, HALVES, groups), 88, dtype=torch.uint8, device=device)
    masses[:, :, : groups // 4] = MASS_CODES - 1
    index = TileIndex(
        torch.zeros(1, 1, groups, dtype=torch.int32, device=device),
        torch.zeros(1, 1, 3, dtype=torch.int32, device=device),
    )
    triton.select_groups(masses, chunk, torch.tensor([0.6], device=device), 16, 0, 0, 0, False, index)
    assert index.counts[0, 0].tolist() == [groups // 4, 0, 0]
    assert torch.equal(index.groups[0, 0, : groups // 4].cpu(), torch.arange(groups // 4, dtype=torch.int32))


def random_index(chunk: Chunk, density: float) -> TileIndex:
    """Random groups; the last head's tiles keep all."""
    generator = torch.Generator().manual_seed(5)
    index = make_index(chunk, (chunk.first_tile + chunk.num_tiles) * GROUPS_PER_TILE)
    for head in range(chunk.num_qo_heads):
        for tile in range(chunk.num_tiles):
            groups = (chunk.first_tile + tile) * GROUPS_PER_TILE
            if head == chunk.num_qo_heads - 1:
                index.counts[head, tile] = torch.tensor([EVERY_GROUP, 0, 0])
                continue
            first, second = torch.rand(HALVES, groups, generator=generator) < density
            write_lists(first, second, index.groups[head, tile], index.counts[head, tile])
    return index


ATTEND_CASES = [
    Case("chunk inside a tile", num_rows=90, context_len=200, num_qo_heads=2, num_kv_heads=1),
    Case("1 row", num_rows=1, context_len=300, num_qo_heads=2, num_kv_heads=2, page_size=128, layout="HND"),
    Case("second half only", num_rows=40, context_len=200, num_qo_heads=3, num_kv_heads=1, page_size=48),
    Case("no context", num_rows=20, context_len=0, num_qo_heads=2, num_kv_heads=1),
    Case("head_dim 128", num_rows=30, context_len=256, num_qo_heads=2, num_kv_heads=1, head_dim=128, dtype=BF16),
    Case("head_dim 256", num_rows=20, context_len=140, num_qo_heads=2, num_kv_heads=1, head_dim=256),
    Case("float32", num_rows=20, context_len=140, num_qo_heads=2, num_kv_heads=1, dtype=torch.float32),
]
attend_cases = [(case, 0.4) for case in ATTEND_CASES] + [(ATTEND_CASES[0], 0.0), (ATTEND_CASES[0], 0.9)]


@pytest.mark.parametrize(
    ("case", "density"), [pytest.param(*params, id=f"{params[0].name}, {params[1]}") for params in attend_cases]
)
def test_attention_covers_the_listed_groups_and_nothing_else(case: Case, density: float, device: torch.device) -> None:
    chunk = make_chunk(case, device)
    chunk.out.fill_(torch.nan)
    index = random_index(chunk, density)
    mask = torch.zeros(case.num_qo_heads, case.num_rows, case.seq_len, dtype=torch.bool)
    for head in range(case.num_qo_heads):
        kept = [kept_by_half(index, chunk, head, tile) for tile in range(chunk.num_tiles)]
        for row in range(case.num_rows):
            tile, offset = divmod(case.context_len + row, TILE)
            before = kept[tile - chunk.first_tile][offset // HALF].repeat_interleave(GROUP)
            mask[head, row, : len(before)] = before
            mask[head, row, len(before) : case.context_len + row + 1] = True
    mask = mask.to(device)
    buffers = AttendBuffers.allocate(case.num_qo_heads, case.num_rows, device)
    triton.attend_tiles(chunk, index, buffers)
    keys, values = (cache[None].float() for cache in gather(chunk.kv, case.seq_len))
    q = chunk.q.transpose(0, 1)[None].float()
    expected = scaled_dot_product_attention(q, keys, values, mask, scale=case.scale, enable_gqa=True)
    assert_close(chunk.out, expected[0].transpose(0, 1).to(case.dtype))
    scores = q[0] @ keys[0].repeat_interleave(chunk.group_size, 0).transpose(1, 2) * case.scale
    lse = scores.masked_fill(~mask, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(buffers.lse, lse, rtol=1e-3, atol=1e-2 if case.dtype == torch.float32 else 1e-3)
    assert buffers.kept_pairs.item() == mask.sum().item()


def choose(chunk: Chunk, kernel: Kernel, garbage: int = 0, **settings: object) -> TileIndex:
    """The method's choice in scratch memory that is a little larger than needed and full of what others left."""
    method = Block(BlockSettings.model_validate({"long_from": 0, **settings}), kernel)
    heads = chunk.num_qo_heads, chunk.kv.num_kv_heads, chunk.head_dim
    shape = ScratchShape(*heads, chunk.q.dtype, max_seq_len=chunk.seq_len + 200, max_chunk=chunk.num_rows + 90)
    scratch = method.scratch(shape, chunk.q.device)
    index, flat = scratch.index, [getattr(scratch, field.name) for field in fields(Shapes)]
    for tensor in (index.groups, index.counts, *flat):
        tensor.fill_(torch.nan if garbage and tensor.is_floating_point() else garbage)
    return method.choose(chunk, method.budgets(chunk.num_qo_heads, chunk.q.device), scratch)


def assert_same_choice(actual: TileIndex, expected: TileIndex, chunk: Chunk) -> None:
    assert torch.equal(actual.counts, expected.counts)
    for head in range(chunk.num_qo_heads):
        for tile in range(chunk.num_tiles):
            kept = [kept_by_half(index, chunk, head, tile) for index in (actual, expected)]
            assert torch.equal(*kept)


@engines
def test_a_choice_depends_on_nothing_left_in_scratch(kernel: Kernel, device: torch.device) -> None:
    chunk = make_chunk(SPARSE, device)
    settings = dict(sink_tokens=16, local_tokens=32, share=0.6, max_density=1.0)
    first, second = (choose(chunk, kernel, garbage, **settings) for garbage in (0, 93))
    assert_same_choice(first, second, chunk)
    assert first.counts[:, :, 0].min() >= 3


def make_tile(before: float, device: torch.device) -> tuple[Chunk, torch.Tensor]:
    """One tile whose queries are 1 and keys 0, with keys of one value before it; and the pages, a group each."""
    chunk = make_chunk(replace(SPARSE, num_rows=100, context_len=2 * TILE), device)
    assert chunk.kv.page_size == GROUP
    pages = chunk.kv.block_table[chunk.kv.row][: -(-chunk.seq_len // GROUP)].long()
    chunk.q[:] = 1
    chunk.kv.k[pages] = 0
    chunk.kv.k[pages[: 2 * TILE // GROUP]] = before
    return chunk, pages


@engines
def test_keys_that_get_all_attention_are_kept(kernel: Kernel, device: torch.device) -> None:
    chunk, pages = make_tile(before=-1.0, device=device)
    chunk.kv.k[pages[5]] = 40
    index = choose(chunk, kernel, share=0.3, sink_tokens=16, local_tokens=32)
    for head in range(chunk.num_qo_heads):
        kept = kept_by_half(index, chunk, head, 0)
        assert kept.sum(1).tolist() == [4, 4]
        assert kept[:, [0, 5, -2, -1]].all()


@engines
def test_equal_keys_are_kept_all_or_not_at_all(kernel: Kernel, device: torch.device) -> None:
    chunk, _ = make_tile(before=-0.5, device=device)
    for share, kept in ((1e-4, 3), (0.99, 2 * GROUPS_PER_TILE)):
        index = choose(chunk, kernel, share=share, sink_tokens=16, local_tokens=32)
        assert kept_by_half(index, chunk, 0, 0).sum(1).tolist() == [kept] * HALVES
    assert (index.counts[:, -1, 0] == EVERY_GROUP).all(), "more than the density that lists have room for"


@engines
def test_the_whole_share_keeps_everything(kernel: Kernel, device: torch.device) -> None:
    chunk = make_chunk(SPARSE, device)
    index = choose(chunk, kernel, share=1.0, max_density=1.0)
    every = [(chunk.first_tile + tile) * GROUPS_PER_TILE for tile in range(chunk.num_tiles)]
    assert index.counts[0, :, 0].tolist() == every


@pytest.mark.parametrize(
    "wrong",
    [{"share": 0}, {"share": 1.1}, {"rows_per_half": 8}, {"sink_tokens": -1}, {"max_density": 0}, {"shares": 0.5}],
    ids=str,
)
def test_settings_out_of_bounds_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        BlockSettings.model_validate(wrong)
