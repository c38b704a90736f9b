// SPDX-License-Identifier: Apache-2.0
// Half of the producer warpgroup converts values from FP8 to fp16, which represents each of them exactly. The tensor
// cores cannot take the values in FP8: wgmma wants FP8 operands K-major, which here is contiguous along the keys, as
// values are not, and probabilities would have to be rounded to FP8 as well.
#pragma once

#include "attend.cuh"

namespace attend {

// One lane's part of a stage: chunks of 16 bytes, each of which becomes two pieces of 16 bytes.
//
// There are no bank conflicts in either ring. Eight lanes access shared memory at a time, and they take four chunks
// from each of two rows. The rows are chosen such that swizzling sends both the eight chunks that are read and the
// eight pieces that are written to different banks.
template <typename Stored, int HEAD_DIM>
struct Part {
    using S = Shape<Stored, HEAD_DIM>;
    static constexpr int CHUNKS = S::ROW_BYTES / 16;
    static constexpr int TIMES = 8 * CHUNKS / hopper::WARP;       // passes of a warp over an atom of eight rows
    static constexpr int ATOMS = TILE / 8 / S::CONVERTING_WARPS;  // per warp
    static constexpr int ATOMS_AT_ONCE = 8 / TIMES;               // so that a lane has eight loads in flight
    static_assert(CHUNKS == 4 || CHUNKS == 8);

    // Places in the first of the warp's atoms, in bytes from the start of a slot.
    uint32_t sources[TIMES], targets[TIMES][2];

    __device__ __forceinline__ explicit Part(int thread) {
        const int lane = thread % hopper::WARP, first_atom = thread / hopper::WARP * ATOMS;
        const int chunk = CHUNKS == 4 ? lane % 4 : lane % 4 + lane / 8 % 2 * 4;
        const int first_row = CHUNKS == 4 ? lane / 4 : (lane / 16) ^ (lane / 4 % 2 * 5);
#pragma unroll
        for (int time = 0; time < TIMES; ++time) {
            const int row = first_row ^ (2 * time);
            const int place = chunk ^ (row * S::SWIZZLE_BYTES / hopper::SWIZZLE_BYTES);
            sources[time] = (first_atom * 8 + row) * S::ROW_BYTES + place * 16;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int piece = 2 * chunk + i;
                const uint32_t in_block = (first_atom * 8 + row) * hopper::SWIZZLE_BYTES + (piece % 8 ^ row) * 16;
                targets[time][i] = piece / 8 * S::VALUE_BLOCK_BYTES + in_block;
            }
        }
    }

    __device__ __forceinline__ void convert(uint32_t stored, uint32_t converted) const {
#pragma unroll
        for (int first = 0; first < ATOMS; first += ATOMS_AT_ONCE) {
            uint4 chunks[ATOMS_AT_ONCE][TIMES];
#pragma unroll
            for (int i = 0; i < ATOMS_AT_ONCE * TIMES; ++i) {
                const int atom = first + i / TIMES, time = i % TIMES;
                chunks[i / TIMES][time] = hopper::load_16_bytes(stored + sources[time] + atom * 8 * S::ROW_BYTES);
            }
#pragma unroll
            for (int i = 0; i < ATOMS_AT_ONCE * TIMES; ++i) {
                const int atom = first + i / TIMES, time = i % TIMES;
                const uint4& chunk = chunks[i / TIMES][time];
                const uint32_t target = converted + atom * hopper::ATOM_BYTES;
                hopper::store_16_bytes(target + targets[time][0], to_fp16(chunk.x, chunk.y));
                hopper::store_16_bytes(target + targets[time][1], to_fp16(chunk.z, chunk.w));
            }
        }
    }

    static __device__ __forceinline__ uint4 to_fp16(uint32_t first, uint32_t second) {
        return make_uint4(
            hopper::e4m3_to_fp16(first, false), hopper::e4m3_to_fp16(first, true), hopper::e4m3_to_fp16(second, false),
            hopper::e4m3_to_fp16(second, true)
        );
    }
};

// Convert stage after stage, whatever tile it belongs to. Rows that a stage does not fill are converted too: they are
// finite, and so are the results.
//   thread: of CONVERTING_WARPS.
template <typename Stored, int HEAD_DIM>
__device__ __forceinline__ void convert(Storage<Stored, HEAD_DIM>& shared, int thread) {
    using S = Shape<Stored, HEAD_DIM>;
    const Part<Stored, HEAD_DIM> part(thread);
    const int lane = thread % hopper::WARP;
    int slot = 0;
    uint32_t phase = 0;
#pragma unroll 1
    while (true) {
        hopper::wait(&shared.full[VALUES][slot][SHARED], phase);
        const int kind = read_for_warp(shared.kinds[slot], lane);
        if (kind == NO_MORE) break;
        hopper::wait(&shared.converted_empty[slot], phase ^ 1);
        // Arrive in place of the half that skips the stage.
        if (thread == 0 && kind != SHARED) hopper::arrive(&shared.converted_empty[slot], WARPS_PER_HALF);
        part.convert(hopper::shared_address(shared.ring[VALUES][slot]), hopper::shared_address(shared.converted[slot]));
        hopper::fence_async_proxy();
        __syncwarp();
        if (lane == 0) {
            hopper::arrive(&shared.converted_full[slot][kind]);
            hopper::arrive(&shared.empty[VALUES][slot]);
        }
        if (++slot == S::STAGES) {
            slot = 0;
            phase ^= 1;
        }
    }
}

}  // namespace attend
