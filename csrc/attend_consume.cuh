// SPDX-License-Identifier: Apache-2.0
// A consumer warpgroup of the attention kernel: online softmax attention of 64 query rows over the stages in the ring.
//
// The scores of a stage and the values of the stage before go to the tensor cores together (FlashAttention-3, arXiv
// 2407.08608, section 3.2), and so do the last values of a tile and the first scores of the next.
#pragma once

#include "attend.cuh"
#include "attend_lanes.cuh"
#include "attend_softmax.cuh"
#include "attend_write.cuh"

namespace attend {

// A stage whose scores have been started, and where its values will be.
struct Scored {
    int slot, kind;
    uint32_t phase;
    bool by_rows;  // whether cp.async copies the values
};

template <typename Stored, int HEAD_DIM, typename Index>
struct Consumer {
    using S = Shape<Stored, HEAD_DIM>;
    using Value = std::conditional_t<S::CONVERTS, __half, Stored>;  // as the tensor cores multiply it
    static constexpr int OUTPUTS = HALF * HEAD_DIM / hopper::WARPGROUP;  // per thread

    const Params& p;
    Storage<Stored, HEAD_DIM>& shared;
    const int half;
    const int thread;  // of the warpgroup
    const int lane = thread % hopper::WARP;
    const int row = first_row(thread);

    // The next stage's slot, and the parities of `full` for shared and for this half's private stages, a bit per slot.
    int slot = 0;
    uint32_t phases[2] = {};
    uint32_t q_phase = 0;

    Scored scored;  // the stage whose values come next

    int steps_left;  // of the tile, after this one

    float first_scores[SCORES];  // of the next tile's first stage
    float acc[OUTPUTS];
    Softmax<Value> softmax;
    float fp8_scale_log2;  // of the tile's scores in FP8
    Probabilities probabilities;  // of the scored stage

    __device__ __forceinline__ Consumer(const Params& p, Storage<Stored, HEAD_DIM>& shared, int half, int thread)
        : p(p), shared(shared), half(half), thread(thread) {}

    // One arrival per warp, because the other warps of the warpgroup may still be reading.
    __device__ __forceinline__ void release(uint64_t* barrier) const {
        if (lane == 0) hopper::arrive(barrier);
    }

    __device__ __forceinline__ int read(const int& word) const { return read_for_warp(word, lane); }

    __device__ __forceinline__ float scale_log2() const { return S::CONVERTS ? fp8_scale_log2 : p.scale_log2; }

    // The halves take turns to start products. Without turns the tensor cores would work on both halves' products at
    // the same time, and then idle while both halves compute exponentials (FlashAttention-3, section 3.1).
    __device__ __forceinline__ void take_turn() const { hopper::wait_named(1 + half, 2 * hopper::WARPGROUP); }
    __device__ __forceinline__ void pass_turn() const { hopper::arrive_named(2 - half, 2 * hopper::WARPGROUP); }

    // Start the scores of the next stage, for as many of its keys as `scores` has room for.
    template <int COUNT>
    __device__ __forceinline__ void start_scores(float (&scores)[COUNT]) {
        const uint32_t q = hopper::shared_address(shared.q[half]);
        const uint32_t k = hopper::shared_address(shared.ring[KEYS][slot]);
        const uint64_t first_a = hopper::descriptor<S::SWIZZLE_BYTES>(q, 16);
        const uint64_t first_b = hopper::descriptor<S::SWIZZLE_BYTES>(k, 16);
        constexpr int IN_BLOCK = S::SWIZZLE_BYTES / hopper::MMA_BYTES;
        hopper::mma_fence();
#pragma unroll
        for (int i = 0; i < S::BLOCKS * IN_BLOCK; ++i) {
            const int block = i / IN_BLOCK, inside = i % IN_BLOCK * hopper::MMA_BYTES;
            const uint64_t a = hopper::advance(first_a, block * S::QUERY_BLOCK_BYTES + inside);
            const uint64_t b = hopper::advance(first_b, block * S::KEY_BLOCK_BYTES + inside);
            if (i == 0) {
                hopper::mma<Stored, false>(scores, a, b);
            } else {
                hopper::mma<Stored, true>(scores, a, b);
            }
        }
        hopper::mma_commit();
    }

    // Start to add the scored stage's values.
    __device__ __forceinline__ void start_values(int its_slot) {
        const uint32_t v = hopper::shared_address(shared.values(its_slot));
        const uint64_t first_b = hopper::descriptor(v, S::VALUE_BLOCK_BYTES);
        hopper::mma_fence();
#pragma unroll
        for (int i = 0; i < TILE / 16; ++i) {
            const uint64_t b = hopper::advance(first_b, i * 16 * hopper::SWIZZLE_BYTES);
            hopper::mma_add<Value>(acc, probabilities[i], b);
        }
        hopper::mma_commit();
    }

    __device__ __forceinline__ void finish_values(int its_slot) {
        hopper::mma_wait<0>();
        hopper::pin(acc);
        release(shared.values_empty(its_slot));
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
        hopper::wait(shared.values_full(its.slot, its.kind), its.phase);
        // The threads that convert values have fenced their stores already.
        if (!S::CONVERTS && its.by_rows) hopper::fence_async_proxy();
    }

    __device__ __forceinline__ void advance() {
        slot = slot + 1 == S::STAGES ? 0 : slot + 1;
    }

    // Wait for the next tile, and start the scores of its first stage, its own keys. Returns whether the tile is past
    // the last.
    __device__ __forceinline__ bool next_tile(Work& work) {
        hopper::wait(&shared.q_full, q_phase);
        q_phase ^= 1;
        work.head = read(shared.work.head);
        work.kv_head = read(shared.work.kv_head);
        work.tile = read(shared.work.tile);
#pragma unroll
        for (int kind = 0; kind < KINDS; ++kind) work.num_groups[kind] = read(shared.work.num_groups[kind]);
        work.num_columns = Index::HAS_COLUMNS ? read(shared.work.num_columns) : 0;
        const bool is_over = read(shared.is_over);
        const bool by_rows = work.is_cut_short(p);
        wait_for_keys<false>(by_rows);
        start_scores(first_scores);
        return is_over;
    }

    __device__ __forceinline__ void finish_first_scores() {
        hopper::mma_wait<0>();
        hopper::pin(first_scores);
        release(&shared.empty[KEYS][slot]);
    }

    // The tile's own keys come first because they give every row a finite maximum.
    __device__ __forceinline__ void begin() {
        // Without further stages no scores will need the queries again.
        if (steps_left == 0) release(&shared.q_empty);
#pragma unroll
        for (int i = 0; i < SCORES; ++i) {
            const bool future = column(lane, i) > half * HALF + row + i / 2 % 2 * 8;
            first_scores[i] = future ? -INFINITY : first_scores[i];
        }
        softmax.begin(first_scores, scale_log2(), probabilities);
#pragma unroll
        for (int i = 0; i < OUTPUTS; ++i) acc[i] = 0.f;
        advance();
    }

    // The next stage's scores and the values of the stage before.
    //   mask: sets the scores that do not count to minus infinity. It may read the stage's mask in shared memory.
    template <int WIDTH, bool IS_PRIVATE, bool BY_ROWS, typename Mask>
    __device__ __forceinline__ void step(Mask mask) {
        const Scored before = scored;
        wait_for_keys<IS_PRIVATE>(BY_ROWS);
        float scores[WIDTH / 2];
        take_turn();
        start_scores(scores);
        wait_for_values(before);
        start_values(before.slot);
        pass_turn();
        // Only the scores must be there; the values may still be added.
        hopper::mma_wait<1>();
        hopper::pin(scores);
        mask(scores);
        release(&shared.empty[KEYS][slot]);
        if (--steps_left == 0) release(&shared.q_empty);
        // Exponentials could be computed before this wait, but to release the slot early is worth more.
        finish_values(before.slot);
        softmax.add(scores, scale_log2(), probabilities, acc);
        advance();
    }

    __device__ __forceinline__ void step_shared() {
        step<TILE, false, false>([](auto&) {});
    }

    //   keys: how many are left in private stages, this one's included; zero or less if the stage is empty.
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

    // Give this half's turn to the other, which has a private stage to itself.
    __device__ __forceinline__ void sit_out() {
        take_turn();
        pass_turn();
    }

    __device__ __forceinline__ void attend_to_groups(const Stages& stages) {
        // How many more private stages this half has than the other. With columns that is 1, 0 or -1: see Stages.
        const int surplus = half == 0 ? stages.own[0] - stages.own[1] : stages.own[1] - stages.own[0];
        const int last_round = Index::HAS_COLUMNS ? 0 : min(1 - surplus, 0);
        int shared_at_end = stages.shared - stages.pairs * stages.shared_per_pair;
        int keys = (half == 0 ? stages.groups[0] : stages.groups[1]) * GROUP;
        // First a round for each pair. Round 0 has the remaining shared stages and the first surplus stage, if there is
        // one. Each further surplus stage is a round with a negative number.
#pragma unroll 1
        for (int round = stages.pairs;; --round, keys -= TILE) {
#pragma unroll 1
            for (int i = round > 0 ? stages.shared_per_pair : shared_at_end; i > 0; --i) step_shared();
            if constexpr (!Index::HAS_COLUMNS) shared_at_end = round > 0 ? shared_at_end : 0;
            const bool is_mine = round > 0 || surplus > 0;
            const bool is_others = round > 0 || Index::HAS_COLUMNS && surplus < 0;
            // In the ring, the first half's stage of a pair precedes the second half's.
            if (half == 1 && is_others) advance();
            if (is_mine) {
                if (keys > HALF) {
                    step_private<TILE>(keys);
                } else {
                    step_private<HALF>(keys);
                }
            } else if (is_others) {
                sit_out();
            }
            if (half == 0 && is_others) advance();
            if (round == last_round) break;
        }
    }

    __device__ __forceinline__ void attend_to(const Work& work) {
        const Stages stages(work, Index::HAS_COLUMNS);
        if constexpr (S::CONVERTS) {
            fp8_scale_log2 = p.scale_log2 * p.q_scale[work.kv_head] * p.k_scale[work.kv_head];
        }
        steps_left = stages.shared + (half == 0 ? stages.own[0] : stages.own[1]) + (work.num_columns + TILE - 1) / TILE;
        begin();
        attend_to_groups(stages);
        if constexpr (Index::HAS_COLUMNS) {
            int columns = work.num_columns;
#pragma unroll 1
            for (; columns > HALF; columns -= TILE) step_columns<TILE>();
            if (columns > 0) step_columns<HALF>();
        }
        wait_for_values(scored);
        start_values(scored.slot);
        finish_values(scored.slot);
        if constexpr (!Index::HAS_COLUMNS) {
            // The other half may have any number of private stages left. They cannot run out of slots, since this half
            // has released all of its own.
            const int others = half == 0 ? stages.own[1] - stages.own[0] : stages.own[0] - stages.own[1];
#pragma unroll 1
            for (int i = 0; i < others; ++i) {
                sit_out();
                advance();
            }
        }
    }
};

//   T: type of the output.
template <typename T, typename Stored, int HEAD_DIM, typename Index>
__device__ __forceinline__ void consume(const Params& p, Storage<Stored, HEAD_DIM>& shared, int half, int thread) {
    constexpr bool HAS_SCALES = Shape<Stored, HEAD_DIM>::CONVERTS;
    Consumer<Stored, HEAD_DIM, Index> consumer(p, shared, half, thread);
    Work work, next;
    // The first turn is half 0's.
    if (half == 1) consumer.pass_turn();
    bool is_over = consumer.next_tile(work);
    consumer.finish_first_scores();
    while (!is_over) {
        consumer.attend_to(work);
        is_over = consumer.next_tile(next);
        const float scale = HAS_SCALES ? p.v_scale[work.kv_head] : 1.f;
        write<T, HEAD_DIM>(p, work, consumer.lane, half * HALF + consumer.row, consumer.acc, consumer.softmax, scale);
        consumer.finish_first_scores();
        work = next;
    }
    // Take the turn that half 1 passed last, so that no named barrier is left half full.
    if (half == 0) consumer.take_turn();
}

}  // namespace attend
