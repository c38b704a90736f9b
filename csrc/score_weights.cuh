// SPDX-License-Identifier: Apache-2.0
// Weights of means, 2^x of their scores, two at a time in fp16.
//
// The bits of an fp16 number, exponent above mantissa, are a whole number that grows by 1024 an octave. So a whole number
// of steps is the bits of 2^n (1 + f) for x = n + f, 0 <= f < 1, which is at most 6% above 2^x. That takes no instruction
// but multiply-adds and one to move bits. The special-function unit would take longer: a scheduler issues one warp
// instruction per cycle, and its units for special functions take 8 cycles for a warp, those for integers 2, those for
// multiply-adds 1. Cycles for the scores of a warp, one score per lane, until their masses are added up:
//
//                                   issued   special   integer   multiply-add
//     2^x by the unit                 5         8         2           3        FFMA, FMNMX, MUFU, 2 FFMA
//     from sums of products in fp32   3.5       0         1           3        2 FFMA, 1/2 (PRMT, 2 HFMA2)
//     from sums of products in fp16   2.5       0         1           2        1/2 (HFMA2, HMUL2, SHL, 2 HFMA2)
//
// The products take the tensor cores 4 cycles if a row has 128 bytes and 8 if it has 256. Sums in fp16 also need half as
// many registers, which the tensor cores read and write in each of their steps.
#pragma once

#include <type_traits>

#include "hopper.cuh"
#include "score.cuh"

namespace score {

constexpr int LISTS_PER_THREAD = 2;
constexpr int PAIRS = ROWS / 2;  // of a list's rows
constexpr int SCORES = HALF * COLUMNS / hopper::WARPGROUP;  // of a thread in an accumulator

// Products of numbers in FP8 are summed up in fp16, two sums in a register: 11 bits are as exact as a weight needs. Such a
// sum may pass fp16's largest number and is then infinite, so that its weight is 0 or 1. Centred means (CENTRE_START in
// minference_vllm/scratch.py) keep sums small: without them a bias of all keys, such as Qwen2.5's, would overflow over a
// cache in FP8 with calibrated scales. Other products may exceed fp16 in any case.
template <typename T>
using Score = std::conditional_t<std::is_same_v<T, hopper::E4M3>, uint32_t, float>;
template <typename T>
constexpr int REGISTERS = std::is_same_v<Score<T>, float> ? SCORES : SCORES / 2;

// See mean_weights in minference_vllm/reference/masses.py. A weight is stored times UNIT. From 1 down to 2^(1 - OCTAVES)
// it is a normal fp16 number. In the octave below it falls to 0 in a straight line.
constexpr float OCTAVES = 20;
constexpr float UNIT = 32;

// (1 + f) / 2^f is 2^CENTRE on average, in logarithms, so that much is taken from x.
constexpr float CENTRE = 0.0573f;

// What is added to x / OCTAVES before it is clamped to [0, 1]; x is a score minus the row's log-sum-exp plus the logarithm
// (base 2) of the number of keys in a mean.
__device__ __forceinline__ float shift(const Params& p, float row_lse) {
    constexpr float LOG2_E = 1.4426950408889634f;
    return fmaf(fmaf(row_lse, -LOG2_E, p.log2_mean - CENTRE), 1 / OCTAVES, 1.0f);
}

// Makes weights from the scores of a thread, for its two lists. Elements 4 j + 2 f + {0, 1} of its accumulator are rows
// 2 (j % 8) + {0, 1} of the list j / 8 under the mean f of two.
template <typename T>
struct Weigher;

// From scores in fp32.
template <>
struct Weigher<float> {
    const float scale;
    float shifts[LISTS_PER_THREAD][ROWS];

    __device__ __forceinline__ explicit Weigher(float scale_log2) : scale(scale_log2 / OCTAVES) {}

    __device__ __forceinline__ void set_rows(int list, int pair, float first_shift, float second_shift) {
        shifts[list][2 * pair] = first_shift;
        shifts[list][2 * pair + 1] = second_shift;
    }

    // What is left of x / OCTAVES + 1, clamped to [0, 1], in the low half of a float's bits: a whole number of steps.
    __device__ __forceinline__ static uint32_t steps(float y) {
        constexpr float STEPS = 1024;  // of an octave, of which an fp16 number has as many
        // In [2^23, 2^24) the last place of a float is 1.
        return __float_as_uint(fmaf(y, OCTAVES * STEPS, 0x1p23f));
    }

    __device__ __forceinline__ uint32_t weigh(const float (&scores)[SCORES], int list, int pair, int f) const {
        constexpr uint32_t LOW_HALVES = 0x5410;
        const float* score = scores + 4 * (list * PAIRS + pair) + 2 * f;
        const float* shift = shifts[list] + 2 * pair;
        const float first = hopper::fma_saturate(score[0], scale, shift[0]);
        const float second = hopper::fma_saturate(score[1], scale, shift[1]);
        return __byte_perm(steps(first), steps(second), LOW_HALVES);
    }
};

// From scores in fp16, two in a register.
template <>
struct Weigher<uint32_t> {
    const uint32_t scale;  // twice
    uint32_t shifts[LISTS_PER_THREAD][PAIRS];

    __device__ __forceinline__ explicit Weigher(float scale_log2)
        : scale(hopper::pack<__half>(scale_log2 / OCTAVES, scale_log2 / OCTAVES)) {}

    __device__ __forceinline__ void set_rows(int list, int pair, float first_shift, float second_shift) {
        shifts[list][pair] = hopper::pack<__half>(first_shift, second_shift);
    }

    __device__ __forceinline__ uint32_t weigh(const uint32_t (&scores)[SCORES / 2], int list, int pair, int f) const {
        // The least fp16 numbers are multiples of 2^-24, and their bits count them. So a factor of 640 * 2^-24 rounds to
        // whole numbers of 1/32 octave, which are then shifted to where fp16 has its octaves.
        constexpr uint32_t STEPS = 32, STEP_BITS = 5, FACTOR = uint32_t(OCTAVES) * STEPS;
        const uint32_t score = scores[2 * (list * PAIRS + pair) + f];
        const uint32_t y = hopper::fma_half2_saturate(score, scale, shifts[list][pair]);
        return hopper::mul_half2(y, FACTOR << 16 | FACTOR) << STEP_BITS;
    }
};

}  // namespace score
