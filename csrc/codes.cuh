// SPDX-License-Identifier: Apache-2.0
// Mass codes, floats of 8 bits: 5 of exponent, 3 of mantissa, no sign. See minference_vllm/reference/codes.py.
#pragma once

#include "hopper.cuh"

namespace codes {

constexpr int NUMBER = 256;
constexpr int OCTAVE_BITS = 3;
constexpr int OCTAVES_BELOW_ONE = 26;
constexpr int DROPPED_BITS = 23 - OCTAVE_BITS;
constexpr int LEAST_BITS = (127 - OCTAVES_BELOW_ONE) << 23;

__device__ __forceinline__ int encode(float mass) {
    const int code = (__float_as_int(mass) - LEAST_BITS + (1 << (DROPPED_BITS - 1))) >> DROPPED_BITS;
    return min(max(code, 0), NUMBER - 1);
}

__device__ __forceinline__ float decode(uint32_t code) {
    return code > 0 ? __uint_as_float((code << DROPPED_BITS) + LEAST_BITS) : 0.0f;
}

// The mass of a code as an integer; a mass of 1 is ONE of minference_vllm/reference/codes.py.
__device__ __forceinline__ int64_t weight(uint32_t code) {
    constexpr uint32_t STEPS = 1 << OCTAVE_BITS;
    return code > 0 ? int64_t(STEPS + code % STEPS) << (code / STEPS) : 0;
}

}  // namespace codes
