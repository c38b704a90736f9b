// SPDX-License-Identifier: Apache-2.0
// The mass that a list's rows give to each group, as a code of one byte.
#pragma once

#include "codes.cuh"
#include "score_exp2.cuh"
#include "score_load.cuh"

namespace score {

constexpr int LISTS_PER_THREAD = 2;
constexpr int SCORES = HALF * COLUMNS / hopper::WARPGROUP;  // of a thread in an accumulator

// A column of a thread's accumulator: a row of one of its two lists. The two rows f = 0 and 1 of the accumulator are
// means.
struct Place {
    int list, row;

    __device__ __forceinline__ explicit Place(int column) : list(column / ROWS), row(column % ROWS) {}
    // Element 4 j + 2 f + e: row 2 (j % 8) + e of list j / 8.
    __device__ __forceinline__ int element(int f) const { return list * 2 * ROWS + row / 2 * 4 + f * 2 + row % 2; }
};

// What is added to a thread's scaled scores to give the logarithm (base 2) of a mean's weight: minus the row's
// log-sum-exp, plus the logarithm of the number of keys in a mean. For the polynomial's rows it gives the `y` of
// polynomial_exp2 instead.
struct Shifts {
    float of[LISTS_PER_THREAD][ROWS];

    __device__ __forceinline__ Shifts(const Params& p, const Job& job, int first_list) {
        constexpr float LOG2_E = 1.4426950408889634f;
#pragma unroll
        for (int l = 0; l < LISTS_PER_THREAD; ++l) {
            const List list(p, min(first_list + l, p.num_lists - 1));
            const int head = job.first_head + list.head;
            const float* lse = p.row_lse + head * p.stride_lse + list.part * ROWS;
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                const float shift = fmaf(__ldg(lse + row), -LOG2_E, p.log2_mean);
                of[l][row] = is_polynomial(row) ? fmaf(shift, 1 / OCTAVES, 1.0f) : shift;
            }
        }
    }
};

// Sums the mass of one of a thread's groups after the other, for both of its lists. For each group it takes the scores
// of two of the four means, then those of the other two, and stores the codes of the sums.
struct MassTaker {
    const float scale_log2, squared, plain;
    const Shifts shifts;
    float mass[LISTS_PER_THREAD] = {};
    uint8_t* codes[LISTS_PER_THREAD];
    int num_groups[LISTS_PER_THREAD];

    __device__ __forceinline__ MassTaker(const Params& p, const Job& job, int first_list, float scale_log2)
        : scale_log2(scale_log2), squared(p.squared), plain(1 - p.squared), shifts(p, job, first_list) {
#pragma unroll
        for (int l = 0; l < LISTS_PER_THREAD; ++l) {
            const List list(p, first_list + l);
            codes[l] = p.masses + (job.first_head + list.head) * p.stride_masses + list.part * p.stride_masses_part;
            num_groups[l] = first_list + l < p.num_lists ? p.num_groups(first_list + l) : 0;
        }
    }

    __device__ __forceinline__ void take(const float (&scores)[SCORES]) {
#pragma unroll
        for (int i = 0; i < SCORES; ++i) {
            // The two lists alternate, so that no addition waits for the one just before it.
            const Place place(i / 4 + i % 2 * ROWS);
            const float score = scores[place.element(i / 2 % 2)];
            const float shift = shifts.of[place.list][place.row];
            // A mean's weight is at most 1 for a row, so its logarithm is clamped to 0.
            const float weight = is_polynomial(place.row)
                                     ? polynomial_exp2(hopper::fma_saturate(score, scale_log2 / OCTAVES, shift))
                                     : hopper::exp2_approx(fminf(fmaf(score, scale_log2, shift), 0.0f));
            float& sum = mass[place.list];
            sum = fmaf(weight, fmaf(weight, squared, plain), sum);
        }
    }

    __device__ __forceinline__ void store(int group) {
#pragma unroll
        for (int l = 0; l < LISTS_PER_THREAD; ++l) {
            const int code = codes::encode(mass[l]);
            if (group < num_groups[l]) codes[l][group] = uint8_t(code);
            mass[l] = 0.0f;
        }
    }
};

}  // namespace score
