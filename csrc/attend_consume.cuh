// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup of the attending kernel: online softmax attention of 64 query rows over the stages of the ring.
//
// The scores of a stage are computed while the values of the stage before are added up (FlashAttention-3,
// arXiv 2407.08608, section 3.2).
#pragma once

#include "attend.cuh"
#include "attend_lanes.cuh"

namespace attend {

template <typename T, int HEAD_DIM>
struct Consumer {
    using S = Shape<HEAD_DIM>;
    static constexpr int OUTPUTS = HALF * HEAD_DIM / hopper::WARPGROUP;  // a thread

    const Params& p;
    Storage<HEAD_DIM>& shared;
    const int half;
    const int thread;  // of the warpgroup
    const int lane = thread % hopper::WARP;
    const int row = first_row(thread);

    static constexpr int NONE = -1;

    // Where the next stage's keys and values are, and the phases of the barriers of shared and of this half's stages, a bit
    // a slot.
    int key_slot = 0, value_slot = 0;
    uint32_t key_phases[2] = {}, value_phases[2] = {};

    // The stage whose values come next.
    int scored_slot, scored_kind;
    uint32_t scored_phase;
    bool scored_by_rows;  // whether cp.async brought them

    int steps_left;     // of the tile, after this one
    int adding = NONE;  // slot of the stage whose values are being added

    float scores[SCORES];  // of the next stage, then exponentials of the scored one's
    float acc[OUTPUTS];
    uint32_t probabilities[SCORES / 8][4];
    float maximum[2], sum[2];  // of scaled scores (base 2); the sum of this thread's columns
    float shrink[2];           // what `acc` is to be multiplied by before more is added

    __device__ __forceinline__ Consumer(const Params& p, Storage<HEAD_DIM>& shared, int half, int thread)
        : p(p), shared(shared), half(half), thread(thread) {}

    // One arrival a warp: the other warps of the group may still be reading.
    __device__ __forceinline__ void leave(uint64_t* barrier) const {
        if (lane == 0) hopper::arrive(barrier);
    }

    __device__ __forceinline__ void start_scores() {
        const uint32_t q = hopper::shared_address(shared.q[half]);
        const uint32_t k = hopper::shared_address(shared.k[key_slot]);
        const uint64_t first_a = hopper::descriptor(q, 16), first_b = hopper::descriptor(k, 16);
        hopper::mma_fence();
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 16; ++i) {
            const uint64_t a = hopper::advance(first_a, i / 4 * S::QUERY_BLOCK_BYTES + i % 4 * 32);
            const uint64_t b = hopper::advance(first_b, i / 4 * S::KEY_BLOCK_BYTES + i % 4 * 32);
            if (i == 0) {
                hopper::mma<T, false>(scores, a, b);
            } else {
                hopper::mma<T, true>(scores, a, b);
            }
        }
        hopper::mma_commit();
    }

    __device__ __forceinline__ void start_values(int its_slot) {
        const uint32_t v = hopper::shared_address(shared.v[its_slot]);
        const uint64_t first_b = hopper::descriptor(v, S::KEY_BLOCK_BYTES);
        hopper::mma_fence();
#pragma unroll
        for (int i = 0; i < TILE / 16; ++i) {
            const uint64_t b = hopper::advance(first_b, i * 16 * hopper::SWIZZLE_BYTES);
            hopper::mma_add<T>(acc, probabilities[i], b);
        }
        hopper::mma_commit();
        adding = its_slot;
    }

    __device__ __forceinline__ void finish_adding() {
        hopper::mma_wait<0>();
        hopper::pin(acc);
        if (adding != NONE) leave(&shared.v_empty[adding]);
        adding = NONE;
    }

    // Online softmax: `scores` become exponentials.
    __device__ __forceinline__ void soften() {
        const float highest[2] = {maximum[0], maximum[1]};
        float top[2] = {scores[0], scores[2]};
#pragma unroll
        for (int i = 0; i < SCORES; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], scores[i]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            maximum[r] = fmaxf(highest[r], row_maximum(top[r]) * p.scale_log2);
            shrink[r] = hopper::exp2_approx(highest[r] - maximum[r]);
            sum[r] *= shrink[r];
        }
#pragma unroll
        for (int i = 0; i < SCORES; ++i) {
            scores[i] = hopper::exp2_approx(fmaf(scores[i], p.scale_log2, -maximum[i / 2 % 2]));
            sum[i / 2 % 2] += scores[i];
        }
    }

    // Make ready to add the scored stage's values. Accumulator blocks of eight columns become operand blocks of sixteen.
    __device__ __forceinline__ void prepare_adding() {
#pragma unroll
        for (int i = 0; i < SCORES / 2; ++i) {
            probabilities[i / 4][i % 4] = hopper::pack<T>(scores[2 * i], scores[2 * i + 1]);
        }
        // Maxima seldom rise after the first few stages.
        if (__any_sync(0xFFFFFFFF, shrink[0] < 1.f || shrink[1] < 1.f)) {
#pragma unroll
            for (int i = 0; i < OUTPUTS; ++i) acc[i] *= shrink[i / 2 % 2];
        }
    }

    // Wait for the next stage's keys, and note where its values will be.
    template <bool IS_PRIVATE>
    __device__ __forceinline__ void wait_for_keys(bool by_rows) {
        scored_kind = IS_PRIVATE ? 1 + half : SHARED;
        scored_slot = value_slot;
        scored_phase = value_phases[IS_PRIVATE] >> value_slot & 1;
        scored_by_rows = by_rows;
        hopper::wait(&shared.k_full[key_slot][scored_kind], key_phases[IS_PRIVATE] >> key_slot & 1);
        key_phases[IS_PRIVATE] ^= 1 << key_slot;
        value_phases[IS_PRIVATE] ^= 1 << value_slot;
    }

    __device__ __forceinline__ void wait_for_values() {
        hopper::wait(&shared.v_full[scored_slot][scored_kind], scored_phase);
    }

    __device__ __forceinline__ void advance() {
        key_slot = key_slot + 1 == S::KEY_STAGES ? 0 : key_slot + 1;
        value_slot = value_slot + 1 == S::VALUE_STAGES ? 0 : value_slot + 1;
    }

    // The tile's own keys: the first stage, which gives every row a finite maximum.
    __device__ __forceinline__ void begin(bool by_rows) {
        wait_for_keys<false>(by_rows);
        if (by_rows) hopper::fence_async_proxy();
        start_scores();
        hopper::mma_wait<0>();
        hopper::pin(scores);
        leave(&shared.k_empty[key_slot]);
        if (steps_left == 0) leave(&shared.q_empty);
#pragma unroll
        for (int i = 0; i < SCORES; ++i) {
            const bool future = column(lane, i) > half * HALF + row + i / 2 % 2 * 8;
            scores[i] = future ? -INFINITY : scores[i];
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            maximum[r] = -1e30f;
            sum[r] = 0.f;
        }
        soften();
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) acc[i] = 0.f;
        advance();
    }

    // The next stage's scores over the values of the stage before. `keep` masks scores; it may read the stage's mask.
    //
    // What is being added is waited for at the next step's start, in another turn of a loop: right after the exponentials,
    // the assembler would move the wait before them, and they are to run meanwhile.
    template <bool IS_PRIVATE, bool BY_ROWS, typename Keep>
    __device__ __forceinline__ void step(Keep keep) {
        finish_adding();
        wait_for_values();
        prepare_adding();
        const int values = scored_slot;
        const bool any_by_rows = scored_by_rows || BY_ROWS;
        wait_for_keys<IS_PRIVATE>(BY_ROWS);
        if (any_by_rows) hopper::fence_async_proxy();
        start_scores();
        start_values(values);
        hopper::mma_wait<1>();
        hopper::pin(scores);
        keep();
        if (BY_ROWS) __syncwarp();  // all lanes have read the mask
        leave(&shared.k_empty[key_slot]);
        if (--steps_left == 0) leave(&shared.q_empty);
        soften();
        advance();
    }

    __device__ __forceinline__ void step_shared() {
        step<false, false>([] {});
    }

    __device__ __forceinline__ void step_private(int keys) {
        step<true, false>([&] {
            if (keys >= TILE) return;
#pragma unroll
            for (int i = 0; i < SCORES; ++i) scores[i] = column(lane, i) < keys ? scores[i] : -INFINITY;
        });
    }

    __device__ __forceinline__ void step_columns() {
        step<false, true>([&] {
            const uint32_t* fresh = shared.fresh[key_slot][half];
#pragma unroll
            for (int word = 0; word < TILE / 32; ++word) {
                const uint32_t bits = fresh[word] >> (lane % 4 * 2);
#pragma unroll
                for (int i = 0; i < SCORES / 4; ++i) {
                    float& score = scores[word * SCORES / 4 + i];
                    score = bits >> (i / 4 * 8 + i % 2) & 1 ? score : -INFINITY;
                }
            }
        });
    }

    __device__ __forceinline__ void attend_to(const Work& work) {
        const BandStages stages(work);
        const int mine = half == 0 ? stages.own[0] : stages.own[1], other = half == 0 ? stages.own[1] : stages.own[0];
        steps_left = stages.shared + mine + (work.num_columns + TILE - 1) / TILE;
        begin(work.is_cut_short(p));
        int bands = half == 0 ? stages.bands[0] : stages.bands[1];
#pragma unroll 1
        for (int pair = 0;; ++pair) {
#pragma unroll 1
            for (int i = stages.shared_before(pair); i > 0; --i) step_shared();
            if (pair >= mine && pair >= other) break;
            // The other half's stage is none of this half's business.
            if (half == 1 && pair < other) advance();
            if (pair < mine) step_private(bands * BAND);
            if (half == 0 && pair < other) advance();
            bands -= BANDS_A_STAGE;
        }
#pragma unroll 1
        for (int entries = work.num_columns; entries > 0; entries -= TILE) step_columns();
        finish_adding();
        wait_for_values();
        if (scored_by_rows) hopper::fence_async_proxy();
        prepare_adding();
        start_values(scored_slot);
        finish_adding();
    }

    // Rows leave in pieces of 16 bytes: the four lanes that hold a row swap what they have of four such pieces.
    __device__ __forceinline__ void write(const Work& work) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float total = row_total(sum[r]);
            const float inverse = 1.f / total;
            const int in_chunk = work.start_row() + half * HALF + row + r * 8 - p.context_len;
            const bool is_in_chunk = in_chunk >= 0 && in_chunk < p.num_rows;
            T* out = static_cast<T*>(p.out) + in_chunk * p.stride_out_row + work.head * p.stride_out_head;
#pragma unroll
            for (int first = 0; first < HEAD_DIM / 8; first += 4) {
                uint32_t piece[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float* both = &acc[4 * (first + i) + 2 * r];
                    piece[i] = hopper::pack<T>(both[0] * inverse, both[1] * inverse);
                }
                transpose_in_quad(lane, piece);
                if (is_in_chunk) {
                    auto* target = reinterpret_cast<uint4*>(out + (first + lane % 4) * 8);
                    *target = make_uint4(piece[0], piece[1], piece[2], piece[3]);
                }
            }
            if (is_in_chunk && lane % 4 == 0) {
                p.lse[work.head * p.stride_lse + in_chunk] = (maximum[r] + log2f(total)) * LN_2;
            }
        }
    }
};

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void consume(const Params& p, Storage<HEAD_DIM>& shared, int half, int thread) {
    Consumer<T, HEAD_DIM> consumer(p, shared, half, thread);
    const Order order(p);
    uint32_t q_phase = 0;
    for (int id = blockIdx.x; id < order.size(p); id += gridDim.x) {
        const Work work = order.at(p, id);
        hopper::wait(&shared.q_full, q_phase);
        q_phase ^= 1;
        consumer.attend_to(work);
        consumer.write(work);
    }
}

}  // namespace attend
