# SPDX-License-Identifier: Apache-2.0
"""Mass codes in kernels: see minference_vllm.reference.codes."""

import triton
import triton.language as tl

from minference_vllm.reference.codes import DROPPED_BITS, LEAST_BITS
from minference_vllm.scratch import CODES_PER_OCTAVE, MASS_CODES

# Bits of the mantissa of a mass code, which is a float of 8 bits.
MANTISSA_BITS = CODES_PER_OCTAVE.bit_length() - 1


@triton.jit
def encode(
    mass,
    DROPPED: tl.constexpr = DROPPED_BITS,
    LEAST: tl.constexpr = LEAST_BITS - (1 << DROPPED_BITS - 1),
    LARGEST: tl.constexpr = MASS_CODES - 1,
):
    """Codes of float32 masses, int32."""
    bits = mass.to(tl.int32, bitcast=True) - LEAST
    return tl.minimum(tl.maximum(bits >> DROPPED, 0), LARGEST)


@triton.jit
def decode(code, DROPPED: tl.constexpr = DROPPED_BITS, LEAST: tl.constexpr = LEAST_BITS):
    """Masses that int32 codes stand for, float32."""
    mass = ((code << DROPPED) + LEAST).to(tl.float32, bitcast=True)
    return tl.where(code > 0, mass, 0.0)


@triton.jit
def weights(code, PER_OCTAVE: tl.constexpr = CODES_PER_OCTAVE, BITS: tl.constexpr = MANTISSA_BITS):
    """Masses that int32 codes stand for, int64."""
    mantissa = (PER_OCTAVE + (code & (PER_OCTAVE - 1))).to(tl.int64)
    return tl.where(code > 0, mantissa << (code >> BITS).to(tl.int64), 0)
