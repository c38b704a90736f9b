# SPDX-License-Identifier: Apache-2.0
"""Mass codes: masses as floats of 8 bits, five of exponent and three of mantissa, without a sign.

A code is the upper bits of a float32 less those of 2^-OCTAVES_BELOW_ONE, near the smallest mass that has a code; code 0
stands for no mass. So encoding, decoding and weighing are shifts and additions, exact on every device.
"""

import torch

from minference_vllm.scratch import CODES_PER_OCTAVE, MASS_CODES, OCTAVES_BELOW_ONE

DROPPED_BITS = 20
"""How many bits of a float32's mantissa a code leaves out."""

LEAST_BITS = 127 - OCTAVES_BELOW_ONE << 23
"""The bits of the float32 2^-OCTAVES_BELOW_ONE, which would have code 0 if that did not stand for no mass."""

ONE = CODES_PER_OCTAVE << OCTAVES_BELOW_ONE
"""The weight of a mass of 1."""


def encode(mass: torch.Tensor) -> torch.Tensor:
    """Codes of masses, uint8: the nearest, of two equally near ones the upper. Masses nearer to none than code 1: 0.

    Args:
        mass: float32, not negative.
    """
    bits = mass.contiguous().view(torch.int32) - LEAST_BITS + (1 << DROPPED_BITS - 1)
    return (bits >> DROPPED_BITS).clamp(0, MASS_CODES - 1).to(torch.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Masses that codes stand for, float32."""
    mass = ((codes.int() << DROPPED_BITS) + LEAST_BITS).view(torch.float32)
    return mass.where(codes > 0, 0)


def weights(codes: torch.Tensor) -> torch.Tensor:
    """Masses that codes stand for, int64, in units of 1 / ONE, so that their sums are exact in any order.

    The largest weight is below 2^35, and 2^24 tokens have 2^20 groups, so sums stay below 2^63.
    """
    mantissa = CODES_PER_OCTAVE + codes.long() % CODES_PER_OCTAVE
    return (mantissa << codes.long() // CODES_PER_OCTAVE).where(codes > 0, 0)


def add(codes: torch.Tensor) -> torch.Tensor:
    """Codes of the sums of masses over the first dimension of `codes`, [parts, ..] uint8.

    There are 1, 2, 4 or 8 parts. Neighbouring parts are added, then their sums, and so on: kernels add in the same
    order, since it decides how sums are rounded.
    """
    mass = decode(codes)
    while len(mass) > 1:
        mass = mass[0::2] + mass[1::2]
    return encode(mass[0])
