# SPDX-License-Identifier: Apache-2.0
"""What scores are products of, rounded to the dtype in which means are kept: the model's own, or FP8."""

import torch

from minference_vllm.scratch import FP8, FP8_MAX, FP8_UNIT


def to_operand(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x`, rounded once to the nearest, ties to even.

    Args:
        x: float32, or of the model's dtype.
        dtype: if it is FP8, the result is in units of FP8_UNIT, and what is past the largest number becomes that.
    """
    return (x.float() / FP8_UNIT).clamp(-FP8_MAX, FP8_MAX).to(FP8) if dtype == FP8 else x.to(dtype)


def from_operand(x: torch.Tensor) -> torch.Tensor:
    """The numbers that `x` stands for, float32."""
    return x.float() * FP8_UNIT if x.dtype == FP8 else x.float()


def query_rows(q: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Query rows as they are scored against `means`, float32: of FP8's numbers where the means are."""
    return from_operand(to_operand(q, FP8)) if means.dtype == FP8 else q.float()


def unit_of_products(means: torch.Tensor) -> float:
    """What the product of a row and a mean, both in `means`' dtype, is a multiple of."""
    return FP8_UNIT**2 if means.dtype == FP8 else 1.0
