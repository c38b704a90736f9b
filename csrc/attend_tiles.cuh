// SPDX-License-Identifier: Apache-2.0
// How the attending kernel's programs come by tiles, and consumers by a tile's queries.
#pragma once

#include "attend.cuh"

namespace attend {

// Draw the number of the tile after this one. Programs differ in speed: whoever is early takes more. Every program draws
// one number too many, so there are as many draws as tiles, and the last one leaves zero for the next launch.
template <int HEAD_DIM>
__device__ __forceinline__ void draw(const Params& p, Storage<HEAD_DIM>& shared, int last, int turn) {
    hopper::wait(&shared.drawn_empty[turn % DRAWN], (turn / DRAWN & 1) ^ 1);
    shared.drawn[turn % DRAWN] = gridDim.x + atomicInc(p.num_drawn, last);
    hopper::arrive(&shared.drawn_full[turn % DRAWN]);
}

template <int HEAD_DIM>
__device__ __forceinline__ int drawn(Storage<HEAD_DIM>& shared, int turn, int lane) {
    hopper::wait(&shared.drawn_full[turn % DRAWN], turn / DRAWN & 1);
    // After its shuffle no lane waits any more: two phases on, one that still did would wait for ever.
    const int id = read_for_warp(shared.drawn[turn % DRAWN], lane);
    if (lane == 0) hopper::arrive(&shared.drawn_empty[turn % DRAWN]);
    return id;
}

// Nobody has read a tile's query rows before: from memory they would come late.
template <int HEAD_DIM>
__device__ __forceinline__ void prefetch_queries(const Params& p, const Work& work, int thread) {
    if (thread >= 2) return;
    const int row = work.start_row() + thread * HALF - p.context_len;
#pragma unroll 1
    for (int i = 0; i < HEAD_DIM; i += hopper::BOX_ELEMENTS) hopper::prefetch_box(&p.q_map, i, work.head, row);
}

// Hand a tile to the consumers with its query rows, once they need those of the tile before no more. L2 needs the rows no
// more either.
template <int HEAD_DIM>
__device__ __forceinline__ void bring_queries(
    const Params& p, Storage<HEAD_DIM>& shared, const Work& work, bool is_over, uint32_t phase
) {
    using S = Shape<HEAD_DIM>;
    hopper::wait(&shared.q_empty, phase ^ 1);
    shared.work = work;
    shared.is_over = is_over;
    hopper::arrive_expecting(&shared.q_full, 2 * S::QUERY_BYTES);
    for (int i = 0; i < 2 * S::BLOCKS; ++i) {
        const int half = i / S::BLOCKS, block = i % S::BLOCKS;
        const uint32_t target = hopper::shared_address(shared.q[half] + block * S::QUERY_BLOCK_BYTES);
        // Rows that the chunk does not have come as zeros.
        const int row = work.start_row() + half * HALF - p.context_len, element = block * hopper::BOX_ELEMENTS;
        hopper::copy_box(
            target, &p.q_map, &shared.q_full, hopper::CacheHint::EVICT_FIRST, element, work.head, row
        );
    }
}

}  // namespace attend
