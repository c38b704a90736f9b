// SPDX-License-Identifier: Apache-2.0
// How programs of the attention kernel get their tiles, and consumers the queries of a tile.
#pragma once

#include "attend.cuh"

namespace attend {

// Draw the number of the next tile from a counter. Programs differ in speed, and with a fixed share for each the fast
// ones would wait for the slow ones at the end. A program's first tile is not drawn, and its last draw lies past the
// last tile. So there are as many draws as tiles, and the last one sets the counter back to zero for the next launch.
template <typename Stored, int HEAD_DIM>
__device__ __forceinline__ void draw_tile(const Params& p, Storage<Stored, HEAD_DIM>& shared, int last, int turn) {
    hopper::wait(&shared.drawn_empty[turn % MAX_DRAWN], (turn / MAX_DRAWN & 1) ^ 1);
    shared.drawn[turn % MAX_DRAWN] = gridDim.x + atomicInc(p.tile_counter, last);
    hopper::arrive(&shared.drawn_full[turn % MAX_DRAWN]);
}

template <typename Stored, int HEAD_DIM>
__device__ __forceinline__ int drawn_tile(Storage<Stored, HEAD_DIM>& shared, int turn, int lane) {
    hopper::wait(&shared.drawn_full[turn % MAX_DRAWN], turn / MAX_DRAWN & 1);
    // The shuffle holds lane 0 back until all lanes have seen this phase. Otherwise the phase after the next could
    // begin while a slow lane still waits, and as its parity is the same, that lane would wait for ever.
    const int id = read_for_warp(shared.drawn[turn % MAX_DRAWN], lane);
    if (lane == 0) hopper::arrive(&shared.drawn_empty[turn % MAX_DRAWN]);
    return id;
}

// Prefetch a tile's query rows into L2. Nothing has read them before, so they would otherwise come from global memory
// when they are needed.
template <typename Shape>
__device__ __forceinline__ void prefetch_queries(const Params& p, const Work& work, int thread) {
    if (thread >= 2) return;
    const int row = work.start_row() + thread * HALF - p.context_len;
#pragma unroll 1
    for (int block = 0; block < Shape::BLOCKS; ++block) {
        hopper::prefetch_box(&p.q_map, block * Shape::BOX_ELEMENTS, work.head, row);
    }
}

// Pass a tile and its query rows to the consumers, when they have finished with the rows of the tile before. Nothing
// will read the rows again, so L2 may drop them first.
template <typename Stored, int HEAD_DIM>
__device__ __forceinline__ void load_queries(
    const Params& p, Storage<Stored, HEAD_DIM>& shared, const Work& work, bool is_over, uint32_t phase
) {
    using S = Shape<Stored, HEAD_DIM>;
    hopper::wait(&shared.q_empty, phase ^ 1);
    shared.work = work;
    shared.is_over = is_over;
    hopper::arrive_expecting(&shared.q_full, 2 * S::QUERY_BYTES);
    for (int i = 0; i < 2 * S::BLOCKS; ++i) {
        const int half = i / S::BLOCKS, block = i % S::BLOCKS;
        const uint32_t target = hopper::shared_address(shared.q[half] + block * S::QUERY_BLOCK_BYTES);
        // Rows outside the chunk come as zeros.
        const int row = work.start_row() + half * HALF - p.context_len, element = block * S::BOX_ELEMENTS;
        hopper::copy_box(
            target, &p.q_map, &shared.q_full, hopper::CacheHint::EVICT_FIRST, element, work.head, row
        );
    }
}

}  // namespace attend
