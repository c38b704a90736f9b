// SPDX-License-Identifier: Apache-2.0
// Sums over columns and diagonals of a warp's 64 rows x 32 keys, in registers.
//
// Lane 4 g + t holds mass[i][c] of row 4 i + t and key g + 8 c. A mass is kept as the bits of the float 1 + p: the bits
// of 1, plus p as an integer in units of 2^-23. Sums include the bits of 1, modulo 2^32; what these add up to is
// subtracted once from each sum.
#pragma once

#include "probe.cuh"

namespace probe {

constexpr uint32_t ONE = 0x3F800000;  // the bits of 1.0f
constexpr int ROWS_PER_THREAD = NUM_PROBES / 4;
constexpr int KEYS_PER_THREAD = 4;
constexpr int KEYS_PER_WARP = 8 * KEYS_PER_THREAD;

using Masses = uint32_t[ROWS_PER_THREAD][KEYS_PER_THREAD];

__device__ __forceinline__ uint32_t from_lane(uint32_t value, int lane) {
    return __shfl_sync(0xFFFFFFFF, value, lane);
}

// Most masses are zero and need no atomic. A predicate replaces the branch that the compiler would make for each
// addition.
__device__ __forceinline__ void add_if_any(int32_t* address, int value) {
    asm volatile(
        "{\n"
        ".reg .pred any;\n"
        "setp.ne.s32 any, %1, 0;\n"
        "@any red.relaxed.gpu.global.add.s32 [%0], %1;\n"
        "}\n" ::"l"(address),
        "r"(value)
        : "memory");
}

// Sum of a column over all rows. Lane 4 g + t gets the sum of key g + 8 t.
__device__ __forceinline__ int sum_column(const Masses& mass, int lane) {
    uint32_t sum[KEYS_PER_THREAD] = {};
#pragma unroll
    for (int i = 0; i < ROWS_PER_THREAD; ++i) {
#pragma unroll
        for (int c = 0; c < KEYS_PER_THREAD; ++c) sum[c] += mass[i][c];
    }
    // Each of four lanes keeps a quarter of the sums and gives the others away.
    const bool odd = lane & 1, upper = lane & 2;
    const uint32_t first = (odd ? sum[1] : sum[0]) + from_lane(odd ? sum[0] : sum[1], lane ^ 1);
    const uint32_t second = (odd ? sum[3] : sum[2]) + from_lane(odd ? sum[2] : sum[3], lane ^ 1);
    const uint32_t total = (upper ? second : first) + from_lane(upper ? first : second, lane ^ 2);
    return int(total - NUM_PROBES * ONE);
}

// Transpose among four lanes: lane 4 g + t gives four keys of row t and gets four rows of key t.
__device__ __forceinline__ void transpose(const uint32_t (&mass)[4], uint32_t (&out)[4], int lane) {
    const bool odd = lane & 1, upper = lane & 2;
    uint32_t half[2][2];  // keys 2 h + t % 2 of rows t / 2 * 2 + r
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const uint32_t received = from_lane(odd ? mass[2 * h] : mass[2 * h + 1], lane ^ 1);
        half[h][0] = odd ? received : mass[2 * h];
        half[h][1] = odd ? mass[2 * h + 1] : received;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const uint32_t received = from_lane(upper ? half[0][r] : half[1][r], lane ^ 2);
        out[r] = upper ? received : half[0][r];
        out[2 + r] = upper ? half[1][r] : received;
    }
}

// Sums of the diagonals row - key = -32 .. 63 of a warp. Lane 4 g + t has masses of the diagonals 4 (i - 2 c) + t - g.
// If t - g is written as u - 4 (hi + wraps) with u = 0 .. 3, the eight lanes of the same u share diagonals. Each of
// them starts with 22 sums of its own masses; after exchanges among the eight it holds three complete sums.
struct Diagonals {
    static constexpr int SUMS = ROWS_PER_THREAD + 2 * (KEYS_PER_THREAD - 1);  // of one thread, before any exchange
    static constexpr int SHARED = 12;                                         // after the first exchange
    static constexpr int KEPT = 3;

    int lane, lane_of_1, lane_of_2;  // partners of the second and the third exchange
    bool hi, wraps;
    int first;              // diagonals of this lane in the end: first, first + 32, first + 64
    uint32_t excess[KEPT];  // what the bits of 1 add up to in each

    __device__ __forceinline__ explicit Diagonals(int lane) : lane(lane) {
        const int g = lane / 4, t = lane % 4;
        const int u = (t - g) & 3;
        hi = g >= 4;
        wraps = t < g % 4;
        const int parity = hi ^ wraps;
        // Lanes of the same u and parity hold the same diagonals; one for each t.
        const auto lane_of = [&](int other) {
            return ((parity ^ (other < u)) * 4 + ((other - u) & 3)) * 4 + other;
        };
        lane_of_1 = lane_of(t ^ 1);
        lane_of_2 = lane_of(t ^ 2);
        first = -KEYS_PER_WARP + 8 * t + 4 * parity + u;
#pragma unroll
        for (int n = 0; n < KEPT; ++n) {
            const int diagonal = first + 32 * n;
            const int pairs = min(KEYS_PER_WARP - 1, NUM_PROBES - 1 - diagonal) - max(0, -diagonal) + 1;
            excess[n] = max(pairs, 0) * ONE;
        }
    }

    // Within a thread: sums[s] is the sum over i - 2 c = s - 6.
    static __device__ __forceinline__ void sum_own(const Masses& mass, uint32_t (&sums)[SUMS]) {
#pragma unroll
        for (int s = 0; s < SUMS; ++s) {
            sums[s] = 0;
#pragma unroll
            for (int c = 0; c < KEYS_PER_THREAD; ++c) {
                const int i = s - 2 * (KEYS_PER_THREAD - 1) + 2 * c;
                if (0 <= i && i < ROWS_PER_THREAD) sums[s] += mass[i][c];
            }
        }
    }

    // The sums of lanes 16 apart are shifted by one place, which is four diagonals. Each lane keeps its even sums and
    // gives away its odd ones. For a lane with neither `hi` nor `wraps` the result is shifted by another place.
    __device__ __forceinline__ void exchange_places(const uint32_t (&sums)[SUMS], uint32_t (&shared)[SHARED]) const {
        uint32_t received[SHARED + 1];  // from index 1 on
        received[0] = received[SHARED] = 0;
#pragma unroll
        for (int n = 0; n < SUMS / 2; ++n) received[n + 1] = from_lane(sums[2 * n + 1], lane ^ 16);
        const bool moves = !hi && !wraps, stays = !hi && wraps;
#pragma unroll
        for (int m = 0; m < SHARED; ++m) {
            const uint32_t here = m < SHARED - 1 ? sums[2 * m] : 0, before = m > 0 ? sums[2 * m - 2] : 0;
            shared[m] = (moves ? before : here) + (stays ? received[m + 1] : received[m]);
        }
    }

    __device__ __forceinline__ void sum(const Masses& mass, int (&totals)[KEPT]) const {
        uint32_t sums[SUMS], shared[SHARED], half[SHARED / 2];
        sum_own(mass, sums);
        exchange_places(sums, shared);
        const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
        for (int n = 0; n < SHARED / 2; ++n) {
            const uint32_t a = shared[2 * n], b = shared[2 * n + 1];
            half[n] = (odd ? b : a) + from_lane(odd ? a : b, lane_of_1);
        }
#pragma unroll
        for (int n = 0; n < KEPT; ++n) {
            const uint32_t a = half[2 * n], b = half[2 * n + 1];
            totals[n] = int((upper ? b : a) + from_lane(upper ? a : b, lane_of_2) - excess[n]);
        }
    }
};

}  // namespace probe
