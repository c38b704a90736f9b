// SPDX-License-Identifier: Apache-2.0
// First pass: the log-sum-exp of each probe row over a range of keys, as a maximum and a sum.
#pragma once

#include "probe_load.cuh"

namespace probe {

// Running maximum (of unscaled scores) and sum of one thread's part of its two rows.
struct alignas(16) Running {
    float max[2], sum[2];
};

// The first or second probe row of a thread.
__device__ __forceinline__ int probe_of(int thread, int f) {
    return probe_at(thread / hopper::WARP * 16 + f * 8 + thread % hopper::WARP / 4);
}

// S = Q K^T for 64 rows and a tile.
template <typename T, int ROW_BYTES>
__device__ __forceinline__ void issue_scores(float (&scores)[64], uint32_t queries, uint32_t keys) {
    using S = Shape<ROW_BYTES>;
    hopper::mma_fence();
#pragma unroll
    for (int step = 0; step < S::BLOCKS * S::STEPS_PER_BLOCK; ++step) {
        const int block = step / S::STEPS_PER_BLOCK, inside = step % S::STEPS_PER_BLOCK * hopper::MMA_BYTES;
        const uint64_t a = hopper::advance(hopper::descriptor(queries, 0), block * S::QUERY_BLOCK_BYTES + inside);
        const uint64_t b = hopper::advance(hopper::descriptor(keys, 0), block * S::KEY_BLOCK_BYTES + inside);
        if (step == 0) {
            hopper::mma<T, false>(scores, a, b);
        } else {
            hopper::mma<T, true>(scores, a, b);
        }
    }
    hopper::mma_commit();
}

// Mask the keys that a row does not see. A thread's element 4 j + 2 f + e belongs to row f of its two and to the key
// 8 j + e, counted from the thread's first key. `last_key[f]`, the last key that row f sees, is counted likewise.
__device__ __forceinline__ void hide(float (&scores)[64], const int (&last_key)[2]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
        if (i / 4 * 8 + i % 2 > last_key[i / 2 % 2]) scores[i] = -INFINITY;
    }
}

__device__ __forceinline__ void add_tile(Running& running, const float (&scores)[64], float scale_log2) {
#pragma unroll
    for (int f = 0; f < 2; ++f) {
        float max[2] = {running.max[f], scores[2 * f]};
#pragma unroll
        for (int i = 0; i < 32; ++i) max[i % 2] = fmaxf(max[i % 2], scores[i / 2 * 4 + f * 2 + i % 2]);
        const float new_max = fmaxf(max[0], max[1]);
        const float shift = -new_max * scale_log2;
        // The difference is scaled, not each maximum: while no key has been seen, both are huge, and the rounding
        // errors of their products would count.
        const float decay = hopper::exp2_approx((running.max[f] - new_max) * scale_log2);
        float sum[2] = {running.sum[f] * decay, 0.0f};
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            sum[i % 2] += hopper::exp2_approx(fmaf(scores[i / 2 * 4 + f * 2 + i % 2], scale_log2, shift));
        }
        running.max[f] = new_max;
        running.sum[f] = sum[0] + sum[1];
    }
}

// Combine the parts of the four threads that share a row.
__device__ __forceinline__ void store_partial(
    const Params& p, const Job& job, int head, const Running& running, int thread, float scale_log2
) {
    const Rows rows(p);
#pragma unroll
    for (int f = 0; f < 2; ++f) {
        float max = running.max[f];
        for (int lanes = 1; lanes < 4; lanes *= 2) max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFF, max, lanes));
        float sum = running.sum[f] * hopper::exp2_approx((running.max[f] - max) * scale_log2);
        for (int lanes = 1; lanes < 4; lanes *= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, lanes);
        if (thread % 4) continue;
        const int probe = probe_of(thread, f);
        const bool is_present = rows.row(probe) >= 0;
        const int64_t at = (int64_t(job.first_head + head) * p.splits + job.split) * NUM_PROBES + probe;
        p.partial_max[at] = is_present ? max * scale_log2 : NO_MAX;
        p.partial_sum[at] = is_present ? sum : 0.0f;
    }
}

template <typename T, int ROW_BYTES>
__device__ __forceinline__ void consume_lse(
    const Params& p, const Shared<ROW_BYTES>& shared, const Job& job, int warpgroup
) {
    using S = Shape<ROW_BYTES>;
    const int thread = threadIdx.x % hopper::WARPGROUP;
    load_queries(p, shared, job);
    hopper::wait_named(ALL_CONSUMERS, CONSUMER_THREADS);
    if (warpgroup >= job.num_heads) return;

    // This needs no barrier, since each thread reads only what it has written itself.
    auto* running = reinterpret_cast<Running*>(shared.heads) + thread;
    for (int head = warpgroup; head < job.num_heads; head += CONSUMERS) {
        running[head * hopper::WARPGROUP] = {{NO_MAX, NO_MAX}, {0.0f, 0.0f}};
    }
    const float scale_log2 = scale_log2_of<T>(p, job);
    const Rows rows(p);
    const int first_key = thread % 4 * 2;
    int last_keys[2];
    for (int f = 0; f < 2; ++f) last_keys[f] = rows.position(probe_of(thread, f)) - first_key;
    const Turns turns(job.num_heads, warpgroup);
    Ring ring;
    for (int tile = job.first_tile; tile < job.first_tile + job.num_tiles; ++tile) {
        const uint32_t keys = hopper::shared_address(shared.keys) + ring.slot * S::KEY_BYTES;
        hopper::wait(&shared.barriers->full[ring.slot], ring.phase);
        for (int head = warpgroup; head < job.num_heads; head += CONSUMERS) {
            float scores[64];
            turns.wait();
            issue_scores<T, ROW_BYTES>(scores, hopper::shared_address(shared.queries) + head * S::QUERY_BYTES, keys);
            Running state = running[head * hopper::WARPGROUP];
            hopper::mma_wait<0>();
            hopper::pin(scores);
            turns.pass();
            const bool is_last = head + CONSUMERS >= job.num_heads;
            if (is_last && thread % hopper::WARP == 0) hopper::arrive(&shared.barriers->empty[ring.slot]);
            if (tile * TILE + TILE - 1 > rows.first_position()) {
                hide(scores, {last_keys[0] - tile * TILE, last_keys[1] - tile * TILE});
            }
            add_tile(state, scores, scale_log2);
            running[head * hopper::WARPGROUP] = state;
        }
        ring.advance(p.stages);
    }
    turns.finish();
    for (int head = warpgroup; head < job.num_heads; head += CONSUMERS) {
        store_partial(p, job, head, running[head * hopper::WARPGROUP], thread, scale_log2);
    }
}

template <typename T, int ROW_BYTES>
__global__ void __launch_bounds__(THREADS, 1) lse_kernel(const __grid_constant__ Params p) {
    extern __shared__ char raw[];
    run_program<ROW_BYTES, false>(p, raw, consume_lse<T, ROW_BYTES>);
}

}  // namespace probe
