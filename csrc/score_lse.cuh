// SPDX-License-Identifier: Apache-2.0
// Normalisers of sampled rows: the means before a row's tile are added to its log-sum-exp over those of the tile.
#pragma once

#include "score_stages.cuh"

namespace score {

// Sums of exponentials relative to the log-sum-exp that is there: no maximum is looked for. They overflow if a row
// gives its own tile less than 2^-127 of its attention; `add_kernel` then takes them for the largest number.
struct LseTaker {
    const float scale_log2;
    const Shifts shifts;
    float sum[LISTS_PER_THREAD][ROWS] = {};
    int groups_left[LISTS_PER_THREAD];  // from the stage's on

    __device__ __forceinline__ LseTaker(const Params& p, const Job& job, int first_list, int first_group)
        : scale_log2(p.scale_log2), shifts(p, job, first_list) {
#pragma unroll
        for (int l = 0; l < LISTS_PER_THREAD; ++l) {
            groups_left[l] = p.num_groups(min(first_list + l, p.num_lists - 1)) - first_group;
        }
    }

    __device__ __forceinline__ void take(const float (&scores)[SCORES]) {
#pragma unroll
        for (int column = 0; column < COLUMNS_PER_THREAD; ++column) {
            const Place place(column);
            const float shift = shifts.of[place.list][place.row];
            const float first = hopper::exp2_approx(fmaf(scores[place.element(0)], scale_log2, shift));
            const float second = hopper::exp2_approx(fmaf(scores[place.element(1)], scale_log2, shift));
            if (groups_left[place.list] > 0) sum[place.list][place.row] += first + second;
        }
    }

    __device__ __forceinline__ void end_stage() {
#pragma unroll
        for (int l = 0; l < LISTS_PER_THREAD; ++l) groups_left[l] -= STAGE_GROUPS;
    }
};

// A consumer's threads put their sums together, in an order that is always the same. The queries' place is free by now.
__device__ __forceinline__ void store_partial(
    const Params& p, const Job& job, char* scratch, const LseTaker& taker, int warpgroup
) {
    constexpr int WARPS = hopper::WARPGROUP / hopper::WARP;
    const int thread = threadIdx.x % hopper::WARPGROUP, lane = thread % hopper::WARP;
    auto& sums = *reinterpret_cast<float (*)[WARPS][COLUMNS]>(scratch);
    hopper::wait_named(1 + warpgroup, hopper::WARPGROUP);
#pragma unroll
    for (int column = 0; column < COLUMNS_PER_THREAD; ++column) {
        const Place place(column);
        float sum = taker.sum[place.list][place.row];
        for (int lanes = 4; lanes < hopper::WARP; lanes *= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, lanes);
        // A list after the other.
        const int target = lane % 4 * COLUMNS_PER_THREAD + column;
        if (lane / 4 == column % 8) sums[thread / hopper::WARP][target] = sum;
    }
    hopper::wait_named(1 + warpgroup, hopper::WARPGROUP);
    const int list = job.first_list + warpgroup * LISTS_PER_CONSUMER + thread / ROWS;
    if (list >= p.num_lists) return;
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += sums[warp][thread];
    p.partial_sum[(int64_t(job.range * p.num_sets + job.set) * p.num_lists + list) * ROWS + thread % ROWS] = total;
}

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void consume_lse(
    const Params& p, Storage<HEAD_DIM>& shared, const Job& job, int warpgroup
) {
    const auto taker = consume<T, HEAD_DIM, LseTaker>(p, shared, job, warpgroup);
    store_partial(p, job, shared.queries[warpgroup], taker, warpgroup);
}

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(THREADS, 1) lse_kernel(const __grid_constant__ Params p) {
    extern __shared__ char raw[];
    run_program<HEAD_DIM>(p, raw, consume_lse<T, HEAD_DIM>);
}

// A thread for each row of each list: add the ranges of means up.
__global__ void __launch_bounds__(THREADS) add_kernel(const __grid_constant__ Params p) {
    constexpr float LN_2 = 0.6931471805599453f, HIGHEST = 3e38f;
    const int64_t num_rows = int64_t(p.num_lists) * ROWS, all_rows = p.num_sets * num_rows;
    const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= all_rows) return;
    const int set = i / num_rows, list_number = i % num_rows / ROWS;
    const List list(p, list_number);
    const int stages = p.num_stages(list_number / LISTS);
    float sum = 0.0f;
    for (int range = 0; range * p.stages_each < stages; ++range) sum += p.partial_sum[range * all_rows + i];
    const int head = p.first_head + set * p.heads_each + list.head;
    float& lse = p.row_lse[head * p.stride_lse + list.part * ROWS + i % ROWS];
    const float reference = reference_of(lse), own = lse == reference ? 1.0f : 0.0f;
    lse = reference + LN_2 * log2f(own + fminf(sum, HIGHEST));
}

}  // namespace score
