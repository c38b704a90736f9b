// SPDX-License-Identifier: Apache-2.0
// The mass that a list's rows give to each group, as a code of one byte.
#pragma once

#include "codes.cuh"
#include "score_load.cuh"
#include "score_weights.cuh"

namespace score {

// Sums the mass of one of a thread's groups after the other, for both of its lists. For each group it takes the scores
// of two of the four means, then those of the other two, and stores the codes of the sums.
template <typename T>
struct MassTaker {
    Weigher<Score<T>> weigher;
    const float plain;
    const uint32_t squared;  // twice, in fp16
    uint32_t mass[LISTS_PER_THREAD][2] = {};  // of even and odd rows, in fp16, for each of two means
    uint8_t* codes[LISTS_PER_THREAD];
    int num_groups[LISTS_PER_THREAD];

    __device__ __forceinline__ MassTaker(const Params& p, const Job& job, int first_list, float scale_log2)
        : weigher(scale_log2), plain(p.plain), squared(hopper::pack<__half>(p.squared, p.squared)) {
#pragma unroll
        for (int l = 0; l < LISTS_PER_THREAD; ++l) {
            const bool exists = first_list + l < p.num_lists;
            const List list(p, exists ? first_list + l : p.num_lists - 1);
            const int head = job.first_head + list.head;
            codes[l] = p.masses + head * p.stride_masses + list.part * p.stride_masses_part;
            num_groups[l] = exists ? p.num_groups(first_list + l) : 0;
            const float* row_lse = p.row_lse + head * p.stride_lse + list.part * ROWS;
#pragma unroll
            for (int pair = 0; pair < PAIRS; ++pair) {
                const float* of_pair = row_lse + 2 * pair;
                weigher.set_rows(l, pair, shift(p, __ldg(of_pair)), shift(p, __ldg(of_pair + 1)));
            }
        }
    }

    __device__ __forceinline__ void take(const Score<T> (&scores)[REGISTERS<T>]) {
        constexpr uint32_t ONE = 0x3C003C00;  // twice, in fp16
#pragma unroll
        for (int i = 0; i < PAIRS * LISTS_PER_THREAD; ++i) {
            // The two lists alternate, so that no addition waits for the one just before it.
            const int list = i % LISTS_PER_THREAD, pair = i / LISTS_PER_THREAD;
#pragma unroll
            for (int f = 0; f < 2; ++f) {
                const uint32_t w = weigher.weigh(scores, list, pair, f);
                mass[list][f] = hopper::fma_half2(w, hopper::fma_half2(w, squared, ONE), mass[list][f]);
            }
        }
    }

    __device__ __forceinline__ void store(int group) {
#pragma unroll
        for (int l = 0; l < LISTS_PER_THREAD; ++l) {
            // Each is at most 2 * PAIRS * UNIT^2, which fp16 holds; their sum may not be.
            const float2 first = hopper::unpack<__half>(mass[l][0]), second = hopper::unpack<__half>(mass[l][1]);
            const int code = codes::encode(((first.x + first.y) + (second.x + second.y)) * plain);
            if (group < num_groups[l]) codes[l][group] = uint8_t(code);
            mass[l][0] = mass[l][1] = 0;
        }
    }
};

}  // namespace score
