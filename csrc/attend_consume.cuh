// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup of the attending kernel: online softmax attention of 64 query rows over the stages of the ring.
//
// The scores of a stage and the values of the stage before go to the tensor cores together (FlashAttention-3, arXiv
// 2407.08608, section 3.2), and so do the end of a tile and the beginning of the next.
#pragma once

#include "attend.cuh"
#include "attend_lanes.cuh"
#include "attend_softmax.cuh"
#include "attend_write.cuh"

namespace attend {

// A stage whose scores are under way or done: where its values will be.
struct Scored {
    int slot, kind;
    uint32_t phase;
    bool by_rows;  // whether cp.async brings them
};

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

    // Where the next stage is, and the phases of the barriers of shared and of this half's stages, a bit a slot.
    int slot = 0;
    uint32_t phases[2] = {};
    uint32_t q_phase = 0;

    Scored scored;  // the stage whose values come next

    int steps_left;  // of the tile, after this one

    float first_scores[SCORES];  // of the next tile's first stage
    float acc[OUTPUTS];
    Softmax<T> softmax;
    Probabilities probabilities;  // of the scored stage

    __device__ __forceinline__ Consumer(const Params& p, Storage<HEAD_DIM>& shared, int half, int thread)
        : p(p), shared(shared), half(half), thread(thread) {}

    // One arrival a warp: the other warps of the group may still be reading.
    __device__ __forceinline__ void leave(uint64_t* barrier) const {
        if (lane == 0) hopper::arrive(barrier);
    }

    __device__ __forceinline__ int read(const int& word) const { return read_for_warp(word, lane); }

    // The two halves take turns to hand products to the tensor cores, which else run both halves' at once: both would then
    // be done, and compute exponentials, at the same time (FlashAttention-3, section 3.1).
    __device__ __forceinline__ void take_turn() const { hopper::wait_named(1 + half, 2 * hopper::WARPGROUP); }
    __device__ __forceinline__ void pass_turn() const { hopper::arrive_named(2 - half, 2 * hopper::WARPGROUP); }

    // Start on the scores of the next stage, of as many of its keys as there is room for.
    template <int COUNT>
    __device__ __forceinline__ void start_scores(float (&scores)[COUNT]) {
        const uint32_t q = hopper::shared_address(shared.q[half]);
        const uint32_t k = hopper::shared_address(shared.ring[KEYS][slot]);
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

    // Start to add the scored stage's values, from their slot.
    __device__ __forceinline__ void start_values(int its_slot) {
        const uint32_t v = hopper::shared_address(shared.ring[VALUES][its_slot]);
        const uint64_t first_b = hopper::descriptor(v, S::KEY_BLOCK_BYTES);
        hopper::mma_fence();
#pragma unroll
        for (int i = 0; i < TILE / 16; ++i) {
            const uint64_t b = hopper::advance(first_b, i * 16 * hopper::SWIZZLE_BYTES);
            hopper::mma_add<T>(acc, probabilities[i], b);
        }
        hopper::mma_commit();
    }

    __device__ __forceinline__ void finish_values(int its_slot) {
        hopper::mma_wait<0>();
        hopper::pin(acc);
        leave(&shared.empty[VALUES][its_slot]);
    }

    // Wait for the next stage's keys, and note where its values will be.
    template <bool IS_PRIVATE>
    __device__ __forceinline__ void wait_for_keys(bool by_rows) {
        scored = {slot, IS_PRIVATE ? 1 + half : SHARED, phases[IS_PRIVATE] >> slot & 1, by_rows};
        hopper::wait(&shared.full[KEYS][slot][scored.kind], scored.phase);
        if (by_rows) hopper::fence_async_proxy();
        phases[IS_PRIVATE] ^= 1 << slot;
    }

    __device__ __forceinline__ void wait_for_values(const Scored& its) {
        hopper::wait(&shared.full[VALUES][its.slot][its.kind], its.phase);
        if (its.by_rows) hopper::fence_async_proxy();
    }

    __device__ __forceinline__ void advance() {
        slot = slot + 1 == S::STAGES ? 0 : slot + 1;
    }

    // Take the next tile, and start on the scores of its first stage: its own keys. Returns whether it is one too many.
    __device__ __forceinline__ bool take(Work& work) {
        hopper::wait(&shared.q_full, q_phase);
        q_phase ^= 1;
        work.head = read(shared.work.head);
        work.kv_head = read(shared.work.kv_head);
        work.tile = read(shared.work.tile);
#pragma unroll
        for (int kind = 0; kind < KINDS; ++kind) work.num_bands[kind] = read(shared.work.num_bands[kind]);
        work.num_columns = read(shared.work.num_columns);
        const bool is_over = read(shared.is_over);
        const bool by_rows = work.is_cut_short(p);
        wait_for_keys<false>(by_rows);
        start_scores(first_scores);
        return is_over;
    }

    __device__ __forceinline__ void finish_first_scores() {
        hopper::mma_wait<0>();
        hopper::pin(first_scores);
        leave(&shared.empty[KEYS][slot]);
    }

    // The tile's own keys give every row a finite maximum.
    __device__ __forceinline__ void begin() {
        if (steps_left == 0) leave(&shared.q_empty);
#pragma unroll
        for (int i = 0; i < SCORES; ++i) {
            const bool future = column(lane, i) > half * HALF + row + i / 2 % 2 * 8;
            first_scores[i] = future ? -INFINITY : first_scores[i];
        }
        softmax.begin(first_scores, p.scale_log2, probabilities);
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) acc[i] = 0.f;
        advance();
    }

    // The next stage's scores and the values of the stage before. `keep` masks scores; it may read the stage's mask.
    template <int WIDTH, bool IS_PRIVATE, bool BY_ROWS, typename Keep>
    __device__ __forceinline__ void step(Keep keep) {
        const Scored before = scored;
        wait_for_keys<IS_PRIVATE>(BY_ROWS);
        float scores[WIDTH / 2];
        take_turn();
        start_scores(scores);
        wait_for_values(before);
        start_values(before.slot);
        pass_turn();
        hopper::mma_wait<1>();
        hopper::pin(scores);
        keep(scores);
        leave(&shared.empty[KEYS][slot]);
        if (--steps_left == 0) leave(&shared.q_empty);
        // The exponentials could run meanwhile, but the slot's next copy is worth more.
        finish_values(before.slot);
        softmax.add(scores, p.scale_log2, probabilities, acc);
        advance();
    }

    __device__ __forceinline__ void step_shared() {
        step<TILE, false, false>([](auto&) {});
    }

    template <int WIDTH>
    __device__ __forceinline__ void step_private(int keys) {
        step<WIDTH, true, false>([&](auto& scores) {
            if (keys >= WIDTH) return;
#pragma unroll
            for (int i = 0; i < WIDTH / 2; ++i) scores[i] = column(lane, i) < keys ? scores[i] : -INFINITY;
        });
    }

    template <int WIDTH>
    __device__ __forceinline__ void step_columns() {
        step<WIDTH, false, true>([&](auto& scores) {
            uint32_t fresh[WIDTH / 32], all = 0xFFFFFFFF;
#pragma unroll
            for (int word = 0; word < WIDTH / 32; ++word) {
                fresh[word] = read(shared.fresh[slot][half][word]);
                all &= fresh[word];
            }
            if (all == 0xFFFFFFFF) return;
#pragma unroll
            for (int word = 0; word < WIDTH / 32; ++word) {
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
        steps_left = stages.shared + (half == 0 ? stages.own[0] : stages.own[1]) + (work.num_columns + TILE - 1) / TILE;
        begin();
        // Private stages of this half without one of the other's: 1, 0, or -1 where it is the other way round.
        const int alone = half == 0 ? stages.own[0] - stages.own[1] : stages.own[1] - stages.own[0];
        const int shared_at_end = stages.shared - stages.pairs * stages.shared_a_pair;
        int keys = (half == 0 ? stages.bands[0] : stages.bands[1]) * BAND;
#pragma unroll 1
        for (int pairs = stages.pairs;; --pairs, keys -= TILE) {
#pragma unroll 1
            for (int i = pairs > 0 ? stages.shared_a_pair : shared_at_end; i > 0; --i) step_shared();
            const bool is_mine = pairs > 0 || alone > 0, is_others = pairs > 0 || alone < 0;
            // The other half's stage is none of this half's business.
            if (half == 1 && is_others) advance();
            if (is_mine) {
                if (keys > HALF) {
                    step_private<TILE>(keys);
                } else {
                    step_private<HALF>(keys);
                }
            } else if (is_others) {
                take_turn();
                pass_turn();
            }
            if (half == 0 && is_others) advance();
            if (pairs == 0) break;
        }
        int columns = work.num_columns;
#pragma unroll 1
        for (; columns > HALF; columns -= TILE) step_columns<TILE>();
        if (columns > 0) step_columns<HALF>();
        wait_for_values(scored);
        start_values(scored.slot);
        finish_values(scored.slot);
    }
};

template <typename T, int HEAD_DIM>
__device__ __forceinline__ void consume(const Params& p, Storage<HEAD_DIM>& shared, int half, int thread) {
    Consumer<T, HEAD_DIM> consumer(p, shared, half, thread);
    Work work, next;
    if (half == 1) consumer.pass_turn();
    bool is_over = consumer.take(work);
    consumer.finish_first_scores();
    while (!is_over) {
        consumer.attend_to(work);
        is_over = consumer.take(next);
        write<T, HEAD_DIM>(p, work, consumer.lane, half * HALF + consumer.row, consumer.acc, consumer.softmax);
        consumer.finish_first_scores();
        work = next;
    }
    if (half == 0) consumer.take_turn();
}

}  // namespace attend
