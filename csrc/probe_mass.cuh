// SPDX-License-Identifier: Apache-2.0
// Second pass: the probe rows' probabilities, added up by column and by diagonal.
#pragma once

#include "probe_load.cuh"
#include "probe_sums.cuh"

namespace probe {

// A head's log-sum-exps in the order in which threads read them: for each t those of rows 4 i + t, contiguous, then
// padding against bank conflicts.
constexpr int LSE_PITCH = ROWS_PER_THREAD + 4;
constexpr int LSE_PER_HEAD = 4 * LSE_PITCH;
static_assert(2 * LSE_PER_HEAD * sizeof(float) <= HEAD_BYTES);  // of one head, and the table of positions

// Log-sum-exp, base 2, of one row over all ranges of keys; -inf if it has seen no key.
__device__ __forceinline__ float combine(const Params& p, int head, int probe) {
    constexpr int AT_ONCE = 8;  // loads in flight
    constexpr float LOWEST = -3e38f;
    const int64_t first = int64_t(head) * p.splits * NUM_PROBES + probe;
    float max = LOWEST, sum = 0.0f;
    for (int start = 0; start < p.splits; start += AT_ONCE) {
        float maxes[AT_ONCE], sums[AT_ONCE], new_max = max;
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const bool ran = start + i < p.splits;
            maxes[i] = ran ? p.partial_max[first + (start + i) * NUM_PROBES] : LOWEST;
            sums[i] = ran ? p.partial_sum[first + (start + i) * NUM_PROBES] : 0.0f;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) new_max = fmaxf(new_max, maxes[i]);
        sum *= hopper::exp2_approx(max - new_max);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) sum += sums[i] * hopper::exp2_approx(maxes[i] - new_max);
        max = new_max;
    }
    return max + log2f(sum);
}

// Run by all consumers: finish the log-sum-exps of the first pass for this program's heads. In shared memory a table of
// the rows' positions follows them.
__device__ __forceinline__ void load_lse(const Params& p, const Job& job, float* shared_lse) {
    constexpr float LN_2 = 0.6931471805599453f;
    for (int i = threadIdx.x; i < job.num_heads * NUM_PROBES; i += CONSUMER_THREADS) {
        const int head = i / NUM_PROBES, probe = i % NUM_PROBES;
        const float lse = combine(p, job.first_head + head, probe);
        if (job.split == 0) p.lse[(job.first_head + head) * p.stride_lse + probe] = lse * LN_2;
        // A row that the chunk does not have gets +inf, so that its masses are zero.
        shared_lse[head * LSE_PER_HEAD + probe % 4 * LSE_PITCH + probe / 4] = lse == -INFINITY ? INFINITY : lse;
    }
    if (threadIdx.x < NUM_PROBES) {
        const int probe = threadIdx.x;
        reinterpret_cast<int*>(shared_lse + job.num_heads * LSE_PER_HEAD)[probe] = Rows(p).position(probe);
    }
}

// S^T = K Q^T for a tile and 64 rows. A warp gets 32 consecutive keys, and scores[h] holds the h-th eight of each 16 of
// them, because the stride of descriptor A skips every second atom of eight keys.
template <typename T, int ROW_BYTES>
__device__ __forceinline__ void issue_transposed(float (&scores)[2][32], uint32_t queries, uint32_t keys) {
    using S = Shape<ROW_BYTES>;
    hopper::mma_fence();
#pragma unroll
    for (int step = 0; step < S::BLOCKS * S::STEPS_PER_BLOCK; ++step) {
        const int block = step / S::STEPS_PER_BLOCK, inside = step % S::STEPS_PER_BLOCK * hopper::MMA_BYTES;
        const uint64_t b = hopper::advance(hopper::descriptor(queries, 0), block * S::QUERY_BLOCK_BYTES + inside);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint64_t first = hopper::descriptor(keys, 0, 2 * hopper::ATOM_BYTES);
            const uint64_t a = hopper::advance(first, block * S::KEY_BLOCK_BYTES + inside + h * hopper::ATOM_BYTES);
            if (step == 0) {
                hopper::mma<T, false>(scores[h], a, b);
            } else {
                hopper::mma<T, true>(scores[h], a, b);
            }
        }
    }
    hopper::mma_commit();
}

// Which masses a thread has: those of rows 4 i + t and of four keys, 8 apart.
template <bool SPREAD>
struct Corner {
    int t, first_key, first_position;
    const int* positions;  // in shared memory, to save registers

    __device__ __forceinline__ int position(int i) const {
        return SPREAD ? positions[4 * i + t] : first_position + 4 * i + t;
    }
};

template <bool SPREAD, bool MASKED>
__device__ __forceinline__ void weigh(
    const float (&scores)[2][32], const float* lse, float scale_log2, const Corner<SPREAD>& corner, Masses& mass
) {
#pragma unroll
    for (int i = 0; i < ROWS_PER_THREAD; ++i) {
        const int last_key = MASKED ? corner.position(i) - corner.first_key : 0;
#pragma unroll
        for (int c = 0; c < KEYS_PER_THREAD; ++c) {
            const float score = scores[c % 2][i / 2 * 4 + c / 2 * 2 + i % 2];
            float p = hopper::exp2_approx(fmaf(score, scale_log2, -lse[i]));
            // Zero is assigned, not multiplied with, since scores of keys past the end may be NaN.
            if (MASKED && 8 * c > last_key) p = 0.0f;
            mass[i][c] = __float_as_uint(1.0f + p);
        }
    }
}

// Spread rows have no diagonal in common within a tile. A warp adds one row's 32 keys at a time, since their sums are
// neighbours in memory.
__device__ __forceinline__ void add_entries(const Masses& mass, const Corner<true>& corner, int lane, int32_t* slash) {
    slash -= corner.first_key + 8 * corner.t;
#pragma unroll
    for (int i = 0; i < ROWS_PER_THREAD; ++i) {
        const int4 positions = *reinterpret_cast<const int4*>(corner.positions + 4 * i);
        uint32_t rows[4];
        transpose(mass[i], rows, lane);
        add_if_any(slash + positions.x, int(rows[0] - ONE));
        add_if_any(slash + positions.y, int(rows[1] - ONE));
        add_if_any(slash + positions.z, int(rows[2] - ONE));
        add_if_any(slash + positions.w, int(rows[3] - ONE));
    }
}

// Add one head's masses of a tile.
template <bool SPREAD, bool MASKED>
__device__ __forceinline__ void add_tile(
    const Params& p, int head, int tile, int first_position, const float* shared_lse, const float* positions,
    const Diagonals& diagonals, const float (&scores)[2][32], float scale_log2
) {
    const int lane = threadIdx.x % hopper::WARP;
    const int warp_key = tile * TILE + threadIdx.x % hopper::WARPGROUP / hopper::WARP * KEYS_PER_WARP;
    const int t = lane % 4;
    const Corner<SPREAD> corner{t, warp_key + lane / 4, first_position, reinterpret_cast<const int*>(positions)};
    float lse[ROWS_PER_THREAD];
#pragma unroll
    for (int i = 0; i < ROWS_PER_THREAD; i += 4) {
        *reinterpret_cast<float4*>(lse + i) = *reinterpret_cast<const float4*>(shared_lse + t * LSE_PITCH + i);
    }
    Masses mass;
    weigh<SPREAD, MASKED>(scores, lse, scale_log2, corner, mass);

    const int column = sum_column(mass, lane);
    const int key = corner.first_key + 8 * t;
    int32_t* vertical = p.vertical + head * p.stride_mass + key;
    if (!MASKED || key < p.seq_len()) *vertical = column + (p.accumulate ? *vertical : 0);

    int32_t* slash = p.slash + head * p.stride_mass;
    if constexpr (SPREAD) {
        add_entries(mass, corner, lane, slash);
    } else {
        int totals[Diagonals::KEPT];
        diagonals.sum(mass, totals);
        int32_t* first = slash + (first_position - warp_key + diagonals.first);
#pragma unroll
        for (int n = 0; n < Diagonals::KEPT; ++n) {
            // On a diagonal where no row sees a key, the mass is zero and nothing is added. The address may then lie
            // outside the head's row.
            add_if_any(first + 32 * n, totals[n]);
        }
    }
}

template <typename T, int ROW_BYTES, bool SPREAD>
__device__ __forceinline__ void consume_mass(
    const Params& p, const Shared<ROW_BYTES>& shared, const Job& job, int warpgroup
) {
    using S = Shape<ROW_BYTES>;
    const auto lse = reinterpret_cast<float*>(shared.heads);
    load_queries(p, shared, job);
    load_lse(p, job, lse);
    hopper::wait_named(ALL_CONSUMERS, CONSUMER_THREADS);
    if (warpgroup >= job.num_heads) return;

    const float* positions = lse + job.num_heads * LSE_PER_HEAD;
    const int first = Rows(p).position(0), first_visible = Rows(p).first_position();
    const float scale_log2 = scale_log2_of<T>(p, job);
    const Diagonals diagonals(threadIdx.x % hopper::WARP);
    const Turns turns(job.num_heads, warpgroup);
    Ring ring;
    for (int tile = job.first_tile + job.num_tiles - 1; tile >= job.first_tile; --tile) {
        const uint32_t keys = hopper::shared_address(shared.keys) + ring.slot * S::KEY_BYTES;
        hopper::wait(&shared.barriers->full[ring.slot], ring.phase);
        for (int head = warpgroup; head < job.num_heads; head += CONSUMERS) {
            float scores[2][32];
            turns.wait();
            issue_transposed<T, ROW_BYTES>(scores, hopper::shared_address(shared.queries) + head * S::QUERY_BYTES, keys);
            hopper::mma_wait<0>();
            hopper::pin(scores[0]);
            hopper::pin(scores[1]);
            turns.pass();
            if (head + CONSUMERS >= job.num_heads && threadIdx.x % hopper::WARP == 0) {
                hopper::arrive(&shared.barriers->empty[ring.slot]);
            }
            const float* head_lse = lse + head * LSE_PER_HEAD;
            if (tile * TILE + TILE - 1 > first_visible) {
                add_tile<SPREAD, true>(
                    p, job.first_head + head, tile, first, head_lse, positions, diagonals, scores, scale_log2
                );
            } else {
                add_tile<SPREAD, false>(
                    p, job.first_head + head, tile, first, head_lse, positions, diagonals, scores, scale_log2
                );
            }
        }
        ring.advance(p.stages);
    }
    turns.finish();
}

template <typename T, int ROW_BYTES, bool SPREAD>
__global__ void __launch_bounds__(THREADS, 1) mass_kernel(const __grid_constant__ Params p) {
    extern __shared__ char raw[];
    run_program<ROW_BYTES, true>(p, raw, consume_mass<T, ROW_BYTES, SPREAD>);
}

}  // namespace probe
