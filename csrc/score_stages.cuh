// SPDX-License-Identifier: Apache-2.0
// A program: scores of means against the rows of its lists, stage by stage, for a taker that makes something of them.
//
// Scores are S^T = K Q^T, means by rows. Of a stage's 16 atoms of 8 means one product takes the even ones: warp w gets
// the first and the third means of the groups of box w. Another takes the odd ones. So between them a thread holds all
// means of one group and, by the order of the columns, all rows of two lists: what is summed over either is summed
// within a thread.
#pragma once

#include "score_load.cuh"

namespace score {

constexpr int LISTS_PER_THREAD = 2;
constexpr int SCORES = HALF * COLUMNS / hopper::WARPGROUP;  // of a thread in an accumulator

// The columns of a thread's accumulator; their rows are f = 0 and 1.
struct Place {
    int list, row;

    __device__ __forceinline__ explicit Place(int column) : list(column / ROWS), row(column % ROWS) {}
    // Element 4 j + 2 f + e: row 2 (j % 8) + e of list j / 8.
    __device__ __forceinline__ int element(int f) const { return list * 2 * ROWS + row / 2 * 4 + f * 2 + row % 2; }
};
constexpr int COLUMNS_PER_THREAD = LISTS_PER_THREAD * ROWS;

// The normaliser that exponentials are taken under, finite or plus infinity. A row in whose tile there is no mean yet
// (the request ends with the tile's third key or before) has minus infinity: zero then serves as well as any.
__device__ __forceinline__ float reference_of(float lse) { return lse == -INFINITY ? 0.0f : lse; }

// What is added to a thread's scaled scores, logarithms to base 2.
struct Shifts {
    float of[LISTS_PER_THREAD][ROWS];

    __device__ __forceinline__ Shifts(const Params& p, const Job& job, int first_list) {
        constexpr float LOG2_E = 1.4426950408889634f, LOG2_MEAN = 2.0f;
#pragma unroll
        for (int l = 0; l < LISTS_PER_THREAD; ++l) {
            const List list(p, min(first_list + l, p.num_lists - 1));
            const int head = p.first_head + job.first_head + list.head;
            const float* lse = p.row_lse + head * p.stride_lse + list.part * ROWS;
#pragma unroll
            for (int row = 0; row < ROWS; ++row) {
                of[l][row] = fmaf(reference_of(__ldg(lse + row)), -LOG2_E, LOG2_MEAN);
            }
        }
    }
};

// Start the scores of every second atom of a stage, from `first` on.
template <typename T, int HEAD_DIM>
__device__ __forceinline__ void start_scores(float (&scores)[SCORES], uint32_t means, uint32_t queries, int first) {
    using S = Shape<HEAD_DIM>;
    const uint64_t first_a = hopper::descriptor(means + first * hopper::ATOM_BYTES, 0, 2 * hopper::ATOM_BYTES);
    const uint64_t first_b = hopper::descriptor(queries, 0);
    hopper::mma_fence();
#pragma unroll
    for (int step = 0; step < S::BLOCKS * S::STEPS_PER_BLOCK; ++step) {
        const int block = step / S::STEPS_PER_BLOCK, inside = step % S::STEPS_PER_BLOCK * 32;
        const uint64_t a = hopper::advance(first_a, block * S::STAGE_BLOCK_BYTES + inside);
        const uint64_t b = hopper::advance(first_b, block * S::QUERY_BLOCK_BYTES + inside);
        if (step == 0) {
            hopper::mma<T, false>(scores, a, b);
        } else {
            hopper::mma<T, true>(scores, a, b);
        }
    }
    hopper::mma_commit();
}

// A consumer warpgroup: while the taker takes the even scores of a stage, its odd ones are computed, and so on.
//   Taker: made of (p, job, the thread's first list, its first group); it takes the scores of two of its group's means,
//   then the other two's, and ends the stage: its next group is STAGE_GROUPS further on.
template <typename T, int HEAD_DIM, typename Taker>
__device__ __forceinline__ Taker consume(const Params& p, Storage<HEAD_DIM>& shared, const Job& job, int warpgroup) {
    using S = Shape<HEAD_DIM>;
    const int thread = threadIdx.x % hopper::WARPGROUP, lane = thread % hopper::WARP;
    const int first_list = job.first_list + warpgroup * LISTS_PER_CONSUMER;
    const int first_group = job.first_stage * STAGE_GROUPS + thread / hopper::WARP * BOX_GROUPS + lane / 4;
    load_queries<HEAD_DIM>(p, shared.queries[warpgroup], job, first_list);
    Taker taker(p, job, first_list + lane % 4 * LISTS_PER_THREAD, first_group);
    hopper::wait_named(1 + warpgroup, hopper::WARPGROUP);

    const uint32_t queries = hopper::shared_address(shared.queries[warpgroup]);
    const uint32_t ring_start = hopper::shared_address(shared.means);
    float even[SCORES], odd[SCORES];
    Ring ring;
    hopper::wait(&shared.full[0], 0);
    start_scores<T, HEAD_DIM>(even, ring_start, queries, 0);
    hopper::mma_wait<0>();
    hopper::pin(even);
#pragma unroll 1
    for (int left = job.num_stages;;) {
        start_scores<T, HEAD_DIM>(odd, ring_start + ring.slot * S::STAGE_BYTES, queries, 1);
        taker.take(even);
        hopper::mma_wait<0>();
        hopper::pin(odd);
        if (lane == 0) hopper::arrive(&shared.empty[ring.slot]);
        // The way out is here also because ptxas would else move the exponentials just taken behind the wait.
        if (--left == 0) break;
        ring.advance(S::STAGES);
        hopper::wait(&shared.full[ring.slot], ring.phase);
        start_scores<T, HEAD_DIM>(even, ring_start + ring.slot * S::STAGE_BYTES, queries, 0);
        taker.take(odd);
        taker.end_stage();
        hopper::mma_wait<0>();
        hopper::pin(even);
    }
    taker.take(odd);
    taker.end_stage();
    return taker;
}

// One program: the last warpgroup produces, the others call `consume`.
template <int HEAD_DIM, typename Consume>
__device__ __forceinline__ void run_program(const Params& p, char* raw, Consume consume) {
    // Swizzled atoms begin at multiples of 1024.
    const uint32_t gap = -hopper::shared_address(raw) & (hopper::ATOM_BYTES - 1);
    auto& shared = *reinterpret_cast<Storage<HEAD_DIM>*>(raw + gap);
    const Job job(p);
    if (job.num_stages <= 0) return;
    const bool second_has_lists = job.first_list + LISTS_PER_CONSUMER < p.num_lists;
    if (threadIdx.x == 0) {
        hopper::prefetch_map(&p.means_map);
        for (int i = 0; i < Shape<HEAD_DIM>::STAGES; ++i) {
            hopper::init_barrier(&shared.full[i], 1);
            hopper::init_barrier(&shared.empty[i], (second_has_lists ? 2 : 1) * 4);  // a warp each
        }
        hopper::fence_barrier_init();
    }
    __syncthreads();
    // Read from lane 0: the compiler then knows that a warp does not part here.
    const int warpgroup = __shfl_sync(0xFFFFFFFF, int(threadIdx.x) / hopper::WARPGROUP, 0);
    if (warpgroup == CONSUMERS) {
        hopper::fewer_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x < CONSUMERS * hopper::WARPGROUP + hopper::WARP) produce<HEAD_DIM>(p, shared, job);
    } else {
        hopper::more_registers<CONSUMER_REGISTERS>();
        if (warpgroup == 0 || second_has_lists) consume(p, shared, job, warpgroup);
    }
}

}  // namespace score
