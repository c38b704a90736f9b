# SPDX-License-Identifier: Apache-2.0
"""Columns and diagonals that hold a share of the attention: the kernel against its twin, and what must hold of them."""

import pytest
import torch

from minference_vllm import ops, reference
from minference_vllm.kernels import triton
from minference_vllm.methods import MAX_TOKENS
from minference_vllm.ops import Kernel
from minference_vllm.reference.select import weights
from minference_vllm.reference.share import largest_masses
from minference_vllm.scratch import SelectBuffers

SHARES = [1e-6, 0.5, 0.9, 1.0]


def make_masses(kind: str, length: int, device: torch.device) -> torch.Tensor:
    """A row for each of SHARES, and past its end what must not count."""
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
    """So many entries hold the share, and without the lightest of them the others would not."""
    for row, share, size in zip(mass.tolist(), torch.tensor(SHARES).tolist(), keep, strict=True):
        weight = weights(torch.tensor([row], dtype=torch.int32), forced)[0].tolist()
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
    for max_keep in (MAX_TOKENS, 12):
        sizes = []
        for share_sizes in (reference.share_sizes, triton.share_sizes):
            buffers = SelectBuffers.allocate(len(SHARES), device)
            for left_over in (buffers.histogram, buffers.counts, buffers.totals):
                left_over.fill_(99)
            keep = torch.full((len(SHARES), 2), -5, dtype=torch.int32, device=device)
            share_sizes(mass, length, share, forced, max_keep, keep[:, 1], buffers)
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
        triton.share_sizes(mass, len(row), share, forced, 99, keep, SelectBuffers.allocate(len(shares), device))
        return keep.tolist()

    row = [0, 1, 64, 16, 8, 8, 2, 1]
    assert sizes(row, 0, [0.01, 0.63, 0.65, 0.79, 0.81, 0.95, 0.97, 1.0]) == [1, 1, 2, 2, 4, 4, 5, 7]
    # The first three are forced and hold 65 of 100: that much need not be found elsewhere.
    assert sizes(row, 3, [0.01, 0.64, 0.66, 0.8, 0.82, 1.0]) == [3, 3, 4, 4, 6, 8]


def test_the_longest_row_overflows_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":  # the interpreter pays for each step
        monkeypatch.setattr("minference_vllm.kernels.triton.share.BLOCK", 2**20)
    mass = torch.full((1, MAX_TOKENS), 2**30, dtype=torch.int32, device=device)
    mass[:, : 2**22] -= 2**28
    keep = torch.zeros(1, dtype=torch.int32, device=device)
    triton.share_sizes(
        mass, MAX_TOKENS, torch.tensor([0.5], device=device), 0, MAX_TOKENS, keep, SelectBuffers.allocate(1, device)
    )
    assert keep.tolist() == [MAX_TOKENS - 2**22]


def test_no_mass_is_larger_than_the_largest_of_its_weight() -> None:
    largest = largest_masses(torch.device("cpu"))

    def weight(mass: torch.Tensor) -> torch.Tensor:
        return weights(mass.int()[None], 0)[0].long()

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
