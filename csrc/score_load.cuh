// SPDX-License-Identifier: Apache-2.0
// How means and sampled rows come into shared memory.
#pragma once

#include "score.cuh"

namespace score {

// Run by one warp: a lane copies 128 bytes of each mean of one box of a stage. A box holds the first means of its 8
// groups, then the second ones, and so on. Each of these four sets is a swizzle atom, so that wgmma can give a thread
// the four means of one group (see score_stages.cuh).
template <typename T, int ROW_BYTES>
__device__ __forceinline__ void produce(const Params& p, Storage<ROW_BYTES>& shared, const Job& job) {
    using S = Shape<ROW_BYTES>;
    constexpr int BOX_ELEMENTS = hopper::SWIZZLE_BYTES / sizeof(T);
    const int lane = threadIdx.x % hopper::WARP;
    const int block = lane % S::BLOCKS, box = lane / S::BLOCKS;
    const bool copies = box < STAGE_BOXES;
    const uint32_t target = hopper::shared_address(shared.means) + block * S::STAGE_BLOCK_BYTES + box * S::BOX_BYTES;
    Ring ring;
    for (int i = 0; i < job.num_stages; ++i) {
        uint64_t* full = &shared.full[ring.slot];
        const int number = copies ? job.box((job.first_stage + i) * STAGE_BOXES + box) : NO_BOX;
        hopper::wait(&shared.empty[ring.slot], ring.phase ^ 1);
        if (copies) shared.boxes[ring.slot][box] = number;
        __syncwarp();
        if (lane == 0) hopper::arrive_expecting(full, S::STAGE_BYTES);
        __syncwarp();
        if (copies) {
            // In place of NO_BOX the last box is copied; its masses are not stored.
            const int group = min(number, p.num_boxes - 1) * BOX_GROUPS;
            hopper::copy_box(
                target + ring.slot * S::STAGE_BYTES, &p.means_map, full, block * BOX_ELEMENTS, group, 0, job.kv_head
            );
        }
        ring.advance(S::STAGES);
    }
}

// Numbers in FP8 are multiples of this unit; see minference_vllm/scratch.py.
constexpr float FP8_UNIT = 4;

// Two numbers of a 16-bit type, in units of FP8_UNIT.
template <typename Q>
__device__ __forceinline__ float2 in_units(int packed) {
    const float2 numbers = hopper::unpack<Q>(packed);
    return make_float2(numbers.x / FP8_UNIT, numbers.y / FP8_UNIT);
}

// Four numbers that are in FP8 already: converted to units of FP8_UNIT, or to two pairs of a 16-bit type.
__device__ __forceinline__ int in_units_of_fp8(int packed) {
    return hopper::pack_e4m3(
        in_units<__half>(hopper::e4m3_to_fp16(packed, false)), in_units<__half>(hopper::e4m3_to_fp16(packed, true))
    );
}
template <typename T>
__device__ __forceinline__ int2 widen(int packed) {
    const float2 first = hopper::unpack<__half>(hopper::e4m3_to_fp16(packed, false));
    const float2 second = hopper::unpack<__half>(hopper::e4m3_to_fp16(packed, true));
    return make_int2(hopper::pack<T>(first.x, first.y), hopper::pack<T>(second.x, second.y));
}

// The i-th 16 bytes of a row, which is of type Q in global memory and is converted to type T.
template <typename T, typename Q>
__device__ __forceinline__ int4 load_piece(const char* row, int i) {
    constexpr bool FROM_FP8 = std::is_same_v<Q, hopper::E4M3>;
    if constexpr (FROM_FP8 && std::is_same_v<T, Q>) {
        const int4 x = __ldg(reinterpret_cast<const int4*>(row) + i);
        return make_int4(in_units_of_fp8(x.x), in_units_of_fp8(x.y), in_units_of_fp8(x.z), in_units_of_fp8(x.w));
    } else if constexpr (FROM_FP8) {
        const int2 x = __ldg(reinterpret_cast<const int2*>(row) + i);
        const int2 first = widen<T>(x.x), second = widen<T>(x.y);
        return make_int4(first.x, first.y, second.x, second.y);
    } else if constexpr (std::is_same_v<T, Q>) {
        return __ldg(reinterpret_cast<const int4*>(row) + i);
    } else {
        const int4 first = __ldg(reinterpret_cast<const int4*>(row) + 2 * i);
        const int4 second = __ldg(reinterpret_cast<const int4*>(row) + 2 * i + 1);
        return make_int4(
            hopper::pack_e4m3(in_units<Q>(first.x), in_units<Q>(first.y)),
            hopper::pack_e4m3(in_units<Q>(first.z), in_units<Q>(first.w)),
            hopper::pack_e4m3(in_units<Q>(second.x), in_units<Q>(second.y)),
            hopper::pack_e4m3(in_units<Q>(second.z), in_units<Q>(second.w))
        );
    }
}

// Run by one consumer warpgroup: load the rows of its lists, convert them from type Q to type T, and store them
// swizzled, as the tensor cores read them.
template <typename T, typename Q, int ROW_BYTES>
__device__ __forceinline__ void load_queries(const Params& p, char* queries, const Job& job, int first_list) {
    using S = Shape<ROW_BYTES>;
    constexpr int PIECES_PER_BLOCK = hopper::SWIZZLE_BYTES / 16;
    constexpr int PIECES = S::BLOCKS * PIECES_PER_BLOCK;
    constexpr int AT_ONCE = hopper::WARPGROUP / PIECES;  // columns
    const int thread = threadIdx.x % hopper::WARPGROUP;
    const int piece = thread % PIECES;
    char* block = queries + piece / PIECES_PER_BLOCK * S::QUERY_BLOCK_BYTES;
#pragma unroll 8
    for (int column = thread / PIECES; column < COLUMNS; column += AT_ONCE) {
        // Columns past the last list read that list again; their masses are not stored.
        const List list(p, min(first_list + list_of(column), p.num_lists - 1));
        const int row = sampled_row(p, list.part, row_of(column)), head = job.first_head + list.head;
        const char* source = p.q + row * p.stride_q_row + head * p.stride_q_head;
        const int swizzled = (piece ^ column) % PIECES_PER_BLOCK;
        *reinterpret_cast<int4*>(block + column * hopper::SWIZZLE_BYTES + swizzled * 16) =
            load_piece<T, Q>(source, piece);
    }
    hopper::fence_async_proxy();
}

}  // namespace score
