# SPDX-License-Identifier: Apache-2.0
"""The operands of dot products, in the dtypes in which they are multiplied: see minference_vllm.reference.operands."""

import triton
import triton.language as tl

from minference_vllm.scratch import FP8_MAX, FP8_UNIT

_UNIT, _MAX = tl.constexpr(FP8_UNIT), tl.constexpr(FP8_MAX)
_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
# Float32 numbers near it are multiples of 2^-9, FP8's smallest step: adding and subtracting it rounds to that step.
_SHIFTER = tl.constexpr(1.5 * 2.0**14)


@triton.jit
def to_fp8(b_x, INTERPRETED: tl.constexpr):
    """Floats as FP8, in units of FP8_UNIT. For the interpreter, whose cast truncates, they are rounded beforehand."""
    b_x = tl.minimum(tl.maximum(b_x.to(tl.float32) / _UNIT, -_MAX), _MAX)
    if INTERPRETED:
        bits = b_x.to(tl.int32, bitcast=True)
        # Rounds off the last 20 bits of the mantissa, ties to even.
        normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) & -0x100000).to(tl.float32, bitcast=True)
        b_x = tl.where(tl.abs(b_x) < _SMALLEST_NORMAL, b_x + _SHIFTER - _SHIFTER, normal)
    return b_x.to(tl.float8e4nv)


@triton.jit
def to_operand(b_x, like_ptr, INTERPRETED: tl.constexpr):
    """Floats in the dtype that the pointer points to."""
    if like_ptr.dtype.element_ty == tl.float8e4nv:
        return to_fp8(b_x, INTERPRETED)
    return b_x.to(like_ptr.dtype.element_ty)


@triton.jit
def from_operand(b_x):
    """The numbers that operands stand for, float32."""
    if b_x.dtype == tl.float8e4nv:
        return b_x.to(tl.float32) * _UNIT
    return b_x.to(tl.float32)


@triton.jit
def query_operand(b_q, means_ptr, INTERPRETED: tl.constexpr):
    """Query rows for a product with means. For means in FP8, rows are rounded to FP8 but keep their own dtype, which
    holds every FP8 number exactly. FP8 rows for other means are converted to the means' dtype, which does too.
    """
    if means_ptr.dtype.element_ty == tl.float8e4nv:
        b_x = dot_operand(to_fp8(b_q, INTERPRETED), b_q.dtype, INTERPRETED)
    elif b_q.dtype == tl.float8e4nv:
        b_x = dot_operand(b_q, means_ptr.dtype.element_ty, INTERPRETED)
    else:
        b_x = dot_operand(b_q, b_q.dtype, INTERPRETED)
    return b_x


@triton.jit
def value_operand(b_v, INTERPRETED: tl.constexpr):
    """Values for a product with probabilities. FP8 values are converted to fp16: it holds them exactly, converting
    takes fewer instructions than to bf16, and probabilities, none of which is above 1, get more digits in it.
    """
    if b_v.dtype == tl.float8e4nv:
        b_x = dot_operand(b_v, tl.float16, INTERPRETED)
    else:
        b_x = dot_operand(b_v, b_v.dtype, INTERPRETED)
    return b_x


@triton.jit
def dot_operand(b_x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """The same numbers in DTYPE or, for the interpreter, whose dot is wrong for bf16, in float32."""
    return b_x.to(tl.float32 if INTERPRETED else DTYPE)
