// SPDX-License-Identifier: Apache-2.0
// 2^x for scores, of which the special-function unit alone makes too few.
//
// A scheduler issues one instruction of a warp a cycle. Of its units the one for special functions takes 8 cycles for a
// warp, the one for integers and comparisons 2, those for multiply-adds 1. What the scores of a warp cost, one a lane:
//
//                              issued   special   integer   multiply-add
//     2^x by the unit             4         8         2           2        FFMA, FMNMX, MUFU, FADD
//     2^x by a polynomial         7         0         4           5        FFMA.SAT, FFMA, SHL, LOP3, 3 FFMA
//     5 of 16 by a polynomial     4.9       5.5       2.6         2.9
//
// Products take the tensor cores 4 cycles where a row has 128 bytes and 8 where it has 256, and all that belongs to a
// stage 0.7 issued for each of its scores. So with 5 of 16 the unit and the scheduler have as much to do, 5.6 cycles.
#pragma once

#include "hopper.cuh"
#include "score.cuh"

namespace score {

// Of a list's ROWS, those whose exponentials are made by the polynomial: any number from 0 to ROWS.
constexpr int POLYNOMIAL_ROWS = 5;

// They are spread evenly, so that both kinds are at hand at any time.
__device__ constexpr bool is_polynomial(int row) {
    return (row + 1) * POLYNOMIAL_ROWS / ROWS > row * POLYNOMIAL_ROWS / ROWS;
}

// An x below -OCTAVES is taken for -OCTAVES: 2^-64 is far below any code.
constexpr float OCTAVES = 64;

// sum + 2^x, where y = 1 + x / OCTAVES, ended at 0 and 1.
//
// With x = n + f, n whole and 0 <= f < 1, the bits of the float 2^n (1 + f) are a linear function of x. The polynomial
// is 2^f / (1 + f) to 0.35%, where a code is a step of 9%.
__device__ __forceinline__ float add_exp2(float sum, float y) {
    constexpr float STEPS = 0x1p15f;  // of an octave
    constexpr int EXPONENT_BIAS = 127, MANTISSA_BITS = 23, STEP_BITS = 15;
    // In [2^23, 2^24) the last place of a float is 1. What lies above the steps is shifted out.
    const float steps = fmaf(y, OCTAVES * STEPS, 0x1p23f + (EXPONENT_BIAS - OCTAVES) * STEPS);
    const uint32_t bits = __float_as_uint(steps) << (MANTISSA_BITS - STEP_BITS);
    // 1 + f: as no x exceeds 0, the exponent has no bit that 1 has not.
    const float mantissa = __uint_as_float(bits | 0x3F800000);
    const float ratio = fmaf(fmaf(mantissa, 0.23370069f, -0.69421414f), mantissa, 1.45706959f);
    return fmaf(__uint_as_float(bits), ratio, sum);
}

}  // namespace score
