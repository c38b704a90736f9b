# SPDX-License-Identifier: Apache-2.0
"""The operands of scores, rounded to the dtype of the means: the model's dtype, or FP8."""

import torch

from minference_vllm.scratch import FP8, FP8_MAX, FP8_UNIT


def to_operand(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x`, rounded once to the nearest, ties to even.

    Args:
        x: float32, or of the model's dtype.
        dtype: if it is FP8, the result is in units of FP8_UNIT, and larger numbers than FP8 has become its largest.
    """
    return (x.float() / FP8_UNIT).clamp(-FP8_MAX, FP8_MAX).to(FP8) if dtype == FP8 else x.to(dtype)


def from_operand(x: torch.Tensor) -> torch.Tensor:
    """The numbers that `x` stands for, float32."""
    return x.float() * FP8_UNIT if x.dtype == FP8 else x.float()


def query_rows(q: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Query rows as they are scored against `means`, float32; rounded to FP8 if the means are FP8."""
    return from_operand(to_operand(q, FP8)) if means.dtype == FP8 else q.float()


def unit_of_products(means: torch.Tensor) -> float:
    """By what to multiply the product of a stored row and a stored mean, both in the dtype of `means`."""
    return FP8_UNIT**2 if means.dtype == FP8 else 1.0
