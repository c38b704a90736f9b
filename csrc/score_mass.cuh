// SPDX-License-Identifier: Apache-2.0
// The mass that a list's rows give to each group, as a code of one byte.
#pragma once

#include "score_stages.cuh"

namespace score {

// See minference_vllm/scratch.py.
constexpr float MASS_CODES = 256;
constexpr float CODES_PER_OCTAVE = 8;
constexpr float OCTAVES_BELOW_ONE = 28;

// In the low byte.
__device__ __forceinline__ uint32_t encode(float mass) {
    const float code = fmaf(CODES_PER_OCTAVE, log2f(mass), CODES_PER_OCTAVE * OCTAVES_BELOW_ONE);
    // Rounded where the unit of a float is one.
    return __float_as_uint(fminf(fmaxf(code, 0.0f), MASS_CODES - 1) + 0x1p23f);
}

struct MassTaker {
    const float scale_log2;
    const Shifts shifts;
    float mass[LISTS_PER_THREAD] = {};
    uint8_t* next[LISTS_PER_THREAD];    // code
    int groups_left[LISTS_PER_THREAD];  // from the stage's on

    __device__ __forceinline__ MassTaker(const Params& p, const Job& job, int first_list, int first_group)
        : scale_log2(p.scale_log2), shifts(p, job, first_list) {
#pragma unroll
        for (int l = 0; l < LISTS_PER_THREAD; ++l) {
            const List list(p, first_list + l);
            next[l] = p.masses + (job.first_head + list.head) * p.stride_masses + list.part * p.stride_masses_part +
                      first_group;
            groups_left[l] = first_list + l < p.num_lists ? p.num_groups(first_list + l) - first_group : 0;
        }
    }

    __device__ __forceinline__ void take(const float (&scores)[SCORES]) {
#pragma unroll
        for (int i = 0; i < SCORES; ++i) {
            // The lists in turn: neither waits for its last addition.
            const Place place(i / 4 + i % 2 * ROWS);
            const float score = scores[place.element(i / 2 % 2)];
            mass[place.list] += hopper::exp2_approx(fmaf(score, scale_log2, shifts.of[place.list][place.row]));
        }
    }

    __device__ __forceinline__ void end_stage() {
#pragma unroll
        for (int l = 0; l < LISTS_PER_THREAD; ++l) {
            const uint32_t code = encode(mass[l]);
            if (groups_left[l] > 0) *next[l] = uint8_t(code);
            next[l] += STAGE_GROUPS;
            groups_left[l] -= STAGE_GROUPS;
            mass[l] = 0.0f;
        }
    }
};

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(THREADS, 1) mass_kernel(const __grid_constant__ Params p) {
    extern __shared__ char raw[];
    run_program<HEAD_DIM>(p, raw, consume<T, HEAD_DIM, MassTaker>);
}

}  // namespace score
