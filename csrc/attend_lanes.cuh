// SPDX-License-Identifier: Apache-2.0
// How wgmma spreads an accumulator of 64 rows over the threads of a warpgroup.
//
// Lane (g = lane / 4, t = lane % 4) of warp w holds the rows 16 w + g and 16 w + g + 8, and of each block of eight
// columns the columns 2 t and 2 t + 1: four registers per block, two of the first row, then two of the second. So a row
// is held by four lanes, a quad.
#pragma once

#include "attend.cuh"

namespace attend {

constexpr int SCORES = HALF * TILE / hopper::WARPGROUP;  // per thread
constexpr float LN_2 = 0.6931471805599453f;

// The first of a thread's two rows; the second is 8 rows further.
__device__ __forceinline__ int first_row(int thread) { return thread / hopper::WARP * 16 + thread % hopper::WARP / 4; }

// The column of a thread's i-th register, which belongs to the thread's row i / 2 % 2.
__device__ __forceinline__ int column(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + i % 2; }

__device__ __forceinline__ float row_maximum(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xFFFFFFFF, x, 2));
}

__device__ __forceinline__ float row_total(float x) {
    x += __shfl_xor_sync(0xFFFFFFFF, x, 1);
    return x + __shfl_xor_sync(0xFFFFFFFF, x, 2);
}

// Lanes whose numbers differ in BIT exchange: the one without BIT gives its `second` and gets the other's `first`.
template <int BIT>
__device__ __forceinline__ void swap_in_quad(int lane, uint32_t& first, uint32_t& second) {
    const bool has_bit = lane & BIT;
    const uint32_t got = __shfl_xor_sync(0xFFFFFFFF, has_bit ? first : second, BIT);
    first = has_bit ? got : first;
    second = has_bit ? second : got;
}

// Lane t of a quad gets the t-th piece of each of the four lanes.
__device__ __forceinline__ void transpose_in_quad(int lane, uint32_t (&piece)[4]) {
    swap_in_quad<1>(lane, piece[0], piece[1]);
    swap_in_quad<1>(lane, piece[2], piece[3]);
    swap_in_quad<2>(lane, piece[0], piece[2]);
    swap_in_quad<2>(lane, piece[1], piece[3]);
}

}  // namespace attend
