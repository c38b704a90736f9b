# SPDX-License-Identifier: Apache-2.0
"""Weights of means, and the codes of their sums."""

import torch

from minference_vllm.reference.codes import ONE, decode, encode, weights
from minference_vllm.reference.masses import OCTAVES, mean_weights
from minference_vllm.scratch import MASS_CODES


def test_weights_are_powers_of_two_to_4_percent() -> None:
    x = torch.linspace(2 - OCTAVES, 0, 5000)
    found = mean_weights(x)
    assert ((found / x.exp2() - 1).abs() < 0.04).all()
    assert (found / x.exp2()).log2().mean().abs() < 1e-3, "as often above as below"
    assert (found.diff() >= 0).all()
    assert mean_weights(torch.tensor([-torch.inf, -OCTAVES - 1.0, 1.0, torch.inf])).tolist() == [0, 0, 1, 1]


def test_codes_of_masses() -> None:
    assert encode(torch.tensor([0.0, 2.0**-27, 2.0**-26, 2.0**-18, 1.0, 32.0, 64.0, torch.inf])).tolist() == [
        0, 0, 0, 64, 208, 248, 255, 255,
    ]  # fmt: skip
    codes = torch.arange(MASS_CODES, dtype=torch.uint8)
    assert torch.equal(encode(weights(codes) / ONE), codes)
    assert torch.equal(decode(codes) * ONE, weights(codes).float())
    # Codes are rounded to nearest: a mass is off by at most half a step, a sixteenth of the least mass of its octave.
    mass = torch.rand(1000, generator=torch.Generator().manual_seed(2)) * 50
    off = (decode(encode(mass)) - mass).abs() / mass.log2().floor().exp2()
    assert 0.06 < off.max() <= 1 / 16
    assert weights(torch.zeros(1, dtype=torch.uint8)).item() == 0
    # The longest prompt has 2^20 groups; even if all have the largest mass, the sum does not overflow.
    assert 0 < weights(codes[-1:]).item() * 2**20 < 2**63
