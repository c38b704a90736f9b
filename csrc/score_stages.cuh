// SPDX-License-Identifier: Apache-2.0
// A program (thread block): scores of means against the rows of its lists, stage by stage, and their masses.
//
// Scores are S^T = K Q^T: rows are means, columns are sampled rows. A stage has 16 atoms of 8 means. One product takes
// the even atoms, which gives warp w the first and third means of the groups of box w. Another takes the odd atoms,
// with the second and fourth means. From both together a thread has all means of one group and, by the order of the
// columns, all rows of two lists. So sums over means and over rows need no other thread.
#pragma once

#include "score_mass.cuh"

namespace score {

// Start the scores of every second atom of a stage, from `first` on.
template <typename T, int ROW_BYTES>
__device__ __forceinline__ void start_scores(Score<T> (&scores)[REGISTERS<T>], uint32_t means, uint32_t queries, int first) {
    using S = Shape<ROW_BYTES>;
    const uint64_t first_a = hopper::descriptor(means + first * hopper::ATOM_BYTES, 0, 2 * hopper::ATOM_BYTES);
    const uint64_t first_b = hopper::descriptor(queries, 0);
    hopper::mma_fence();
#pragma unroll
    for (int step = 0; step < S::BLOCKS * S::STEPS_PER_BLOCK; ++step) {
        const int block = step / S::STEPS_PER_BLOCK, inside = step % S::STEPS_PER_BLOCK * hopper::MMA_BYTES;
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

// A consumer warpgroup. While the taker works on the scores of a stage's even atoms, the tensor cores compute those of
// its odd atoms; while it works on these, they compute those of the next stage's even atoms.
//
// A warp skips a box that no list sees. The branches for this also help, because ptxas moves no instruction across
// them. Without them it spreads the products of a stage among the exponentials, so that the last products start only
// when they are waited for, and it moves exponentials behind the wait.
template <typename T, typename Q, int ROW_BYTES>
__device__ __forceinline__ void consume(const Params& p, Storage<ROW_BYTES>& shared, const Job& job, int warpgroup) {
    using S = Shape<ROW_BYTES>;
    const int lane = threadIdx.x % hopper::WARP;
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x % hopper::WARPGROUP / hopper::WARP, 0);
    const int first_list = job.first_list + warpgroup * LISTS_PER_CONSUMER;
    const int num_groups = p.num_groups(min(first_list + LISTS_PER_CONSUMER, p.num_lists) - 1);  // of the last list
    load_queries<T, Q, ROW_BYTES>(p, shared.queries[warpgroup], job, first_list);
    float scale_log2 = p.scale_log2;
    if constexpr (std::is_same_v<Q, hopper::E4M3>) scale_log2 *= p.q_scale[job.kv_head] * p.k_scale[job.kv_head];
    MassTaker<T> taker(p, job, first_list + lane % 4 * LISTS_PER_THREAD, scale_log2);
    hopper::wait_named(1 + warpgroup, hopper::WARPGROUP);

    const uint32_t queries = hopper::shared_address(shared.queries[warpgroup]);
    const uint32_t ring_start = hopper::shared_address(shared.means);
    Score<T> even[REGISTERS<T>], odd[REGISTERS<T>];
    Ring ring;
    hopper::wait(&shared.full[0], 0);
    int first_group = shared.boxes[0][warp] * BOX_GROUPS;
    start_scores<T, ROW_BYTES>(even, ring_start, queries, 0);
    hopper::mma_wait<0>();
    hopper::pin(even);
#pragma unroll 1
    for (int left = job.num_stages;;) {
        start_scores<T, ROW_BYTES>(odd, ring_start + ring.slot * S::STAGE_BYTES, queries, 1);
        if (first_group < num_groups) taker.take(even);
        hopper::mma_wait<0>();
        hopper::pin(odd);
        if (lane == 0) hopper::arrive(&shared.empty[ring.slot]);
        if (--left == 0) break;
        ring.advance(S::STAGES);
        hopper::wait(&shared.full[ring.slot], ring.phase);
        const int next_group = shared.boxes[ring.slot][warp] * BOX_GROUPS;
        start_scores<T, ROW_BYTES>(even, ring_start + ring.slot * S::STAGE_BYTES, queries, 0);
        if (first_group < num_groups) {
            taker.take(odd);
            taker.store(first_group + lane / 4);
        }
        first_group = next_group;
        hopper::mma_wait<0>();
        hopper::pin(even);
    }
    if (first_group < num_groups) {
        taker.take(odd);
        taker.store(first_group + lane / 4);
    }
}

// One program: the last warpgroup produces, the others call `consume`. The tensor cores multiply type T; queries in
// global memory are of type Q.
template <typename T, typename Q, int HEAD_DIM>
__global__ void __launch_bounds__(THREADS, 1) mass_kernel(const __grid_constant__ Params p) {
    constexpr int ROW_BYTES = HEAD_DIM * sizeof(T);
    extern __shared__ char raw[];
    // Swizzle atoms must begin at multiples of 1024 bytes, which dynamic shared memory need not do.
    const uint32_t gap = -hopper::shared_address(raw) & (hopper::ATOM_BYTES - 1);
    auto& shared = *reinterpret_cast<Storage<ROW_BYTES>*>(raw + gap);
    const Job job(p);
    if (job.num_stages <= 0) return;
    const bool second_has_lists = job.first_list + LISTS_PER_CONSUMER < p.num_lists;
    if (threadIdx.x == 0) {
        hopper::prefetch_map(&p.means_map);
        for (int i = 0; i < Shape<ROW_BYTES>::STAGES; ++i) {
            hopper::init_barrier(&shared.full[i], 1);
            hopper::init_barrier(&shared.empty[i], (second_has_lists ? 2 : 1) * 4);  // each warp
        }
        hopper::fence_barrier_init();
    }
    __syncthreads();
    // The broadcast from lane 0 tells the compiler that all lanes of a warp take the same branch.
    const int warpgroup = __shfl_sync(0xFFFFFFFF, int(threadIdx.x) / hopper::WARPGROUP, 0);
    if (warpgroup == CONSUMERS) {
        hopper::fewer_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x < CONSUMERS * hopper::WARPGROUP + hopper::WARP) produce<T>(p, shared, job);
    } else {
        hopper::more_registers<CONSUMER_REGISTERS>();
        if (warpgroup == 0 || second_has_lists) consume<T, Q>(p, shared, job, warpgroup);
    }
}

}  // namespace score
