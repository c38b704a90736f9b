// SPDX-License-Identifier: Apache-2.0
// 2^x of scores, the weights of means. The special-function unit alone would be too slow, so a polynomial computes some
// of them.
//
// A scheduler issues one warp instruction per cycle. Its unit for special functions takes 8 cycles for a warp, its unit
// for integers and comparisons 2, its units for multiply-adds 1. Cycles for the scores of a warp, one score per lane,
// until their masses are added up:
//
//                              issued   special   integer   multiply-add
//     2^x by the unit             5         8         2           3        FFMA, FMNMX, MUFU, 2 FFMA
//     2^x by a polynomial         9         0         4           7        FFMA.SAT, FFMA, SHL, LOP3, 2 FFMA, FMUL, 2 FFMA
//     3 of 16 by a polynomial     5.8       6.5       2.4         3.8
//
// The products take the tensor cores 4 cycles if a row has 128 bytes and 8 if it has 256. The other instructions of a
// stage are 0.7 issued for each of its scores. So with 3 of 16 by the polynomial the scheduler (5.8 + 0.7) and the
// special-function unit (6.5) are equally busy.
#pragma once

#include "hopper.cuh"
#include "score.cuh"

namespace score {

// For how many of a list's ROWS the polynomial computes the exponentials: any number from 0 to ROWS.
constexpr int POLYNOMIAL_ROWS = 3;

// They are spread evenly, so that at any time there are instructions for both units.
__device__ constexpr bool is_polynomial(int row) {
    return (row + 1) * POLYNOMIAL_ROWS / ROWS > row * POLYNOMIAL_ROWS / ROWS;
}

// An x below -OCTAVES counts as -OCTAVES, because 2^-64 is far less than the mass of any code but 0.
constexpr float OCTAVES = 64;

// 2^x, where y is 1 + x / OCTAVES, clamped to [0, 1].
//
// With x = n + f, n whole and 0 <= f < 1, the bits of the float 2^n (1 + f) are a linear function of x. The polynomial
// is 2^f / (1 + f) to 0.35%, which is little beside the step of 9% from one code to the next.
__device__ __forceinline__ float polynomial_exp2(float y) {
    constexpr float STEPS = 0x1p15f;  // of an octave
    constexpr int EXPONENT_BIAS = 127, MANTISSA_BITS = 23, STEP_BITS = 15;
    // In [2^23, 2^24) the last place of a float is 1, so the low bits of the sum are a whole number of steps. The shift
    // makes them exponent and mantissa, and moves the bits above them out.
    const float steps = fmaf(y, OCTAVES * STEPS, 0x1p23f + (EXPONENT_BIAS - OCTAVES) * STEPS);
    const uint32_t bits = __float_as_uint(steps) << (MANTISSA_BITS - STEP_BITS);
    // 1 + f: no x exceeds 0, so the exponent is at most 127, and the bits of 1 turn it into 127.
    const float mantissa = __uint_as_float(bits | 0x3F800000);
    const float ratio = fmaf(fmaf(mantissa, 0.23370069f, -0.69421414f), mantissa, 1.45706959f);
    return __uint_as_float(bits) * ratio;
}

}  // namespace score
