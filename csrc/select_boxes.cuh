// SPDX-License-Identifier: Apache-2.0
// Selects the boxes that are scored finely for each block of sixteen lists, from the masses of boxes. There is a
// program (thread block) for each block of lists. The reference is minference_vllm/reference/boxes.py.
//
// Each warp finds the threshold of one list. A box's margin is by how far its code lies above the threshold of the list
// that wants it most. All warps go through the boxes together, first to count how many have each margin, then to keep
// or drop each box.
#pragma once

#include "codes.cuh"
#include "hopper.cuh"
#include "select.cuh"

namespace selection {

constexpr int LISTS = 16;
constexpr int BOX_THREADS = LISTS * hopper::WARP;
constexpr int FORCED = 256;  // above all differences of two codes
constexpr int MARGINS = 2 * FORCED;
static_assert(MARGINS == BOX_THREADS);  // thread i counts the boxes of margin i
constexpr int BOXES = 4;                // that a thread takes at a time: a word of codes
constexpr int FIRST_COUNTED_BOX = 1;    // box 0 holds the first keys, which the rows' normalisers have seen

struct BoxParams {
    const uint8_t* box_masses;
    const float* share;
    int32_t *numbers, *counts;
    int64_t* masses;  // one element of `masses` is the eight codes of a box's groups
    int64_t stride_box_masses, stride_box_part, stride_numbers, stride_block, stride_counts, stride_masses,
        stride_part;
    int64_t part_weight;  // of the rows of a part
    double part_of_dropped;
    int32_t context_len, num_lists, num_blocks, group_size, parts_per_tile;
    int32_t sink_boxes, local_boxes, max_boxes;
};

// A list, and which of the boxes before its tile may be dropped: those from `sinks` to `local` below `threshold`.
struct BoxList {
    const uint8_t* codes;
    int64_t* words;
    int32_t head, before, sinks, local, threshold;
};

struct BoxStorage {
    int32_t tallies[LISTS][codes::NUMBER];
    int32_t margins[MARGINS];
    BoxList lists[LISTS];
    int32_t numbers[2][LISTS];
};

__device__ __forceinline__ BoxList find_list(const BoxParams& p, int kv_head, int number) {
    const int list = min(number, p.num_lists - 1);  // the last list stands in for those that the last block lacks
    const int head = kv_head * p.group_size + list % p.group_size, part = list / p.group_size;
    BoxList found;
    found.head = head;
    found.codes = p.box_masses + head * p.stride_box_masses + part * p.stride_box_part;
    found.words = p.masses + head * p.stride_masses + part * p.stride_part;
    found.before = p.context_len / TILE + part / p.parts_per_tile;
    found.sinks = min(p.sink_boxes, found.before);
    found.local = max(found.before - p.local_boxes, found.sinks);
    return found;
}

template <typename T>
__device__ __forceinline__ T sum_of_warp(T value) {
#pragma unroll
    for (int bit = 1; bit < hopper::WARP; bit *= 2) value += __shfl_xor_sync(0xFFFFFFFF, value, bit);
    return value;
}

// Run by one warp: the least code of the boxes that a list keeps.
__device__ __forceinline__ int find_threshold(
    const BoxParams& p, const BoxList& list, int32_t (&tally)[codes::NUMBER], int lane
) {
    constexpr int CODES_EACH = codes::NUMBER / hopper::WARP;
    for (int i = lane; i < codes::NUMBER; i += hopper::WARP) tally[i] = 0;
    __syncwarp();
    for (int start = lane * PIECE; start < list.local; start += hopper::WARP * PIECE) {
        const Sixteen sixteen = load(list.codes + start);
        if (sixteen.are_zero()) continue;
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            const int code = sixteen.code(i), box = start + i;
            if (code > 0 && box >= list.sinks && box < list.local) atomicAdd(&tally[code], 1);
        }
    }
    __syncwarp();
    int64_t each[CODES_EACH], sum = 0;
#pragma unroll
    for (int i = 0; i < CODES_EACH; ++i) {
        const int code = lane * CODES_EACH + i;
        each[i] = sum += tally[code] * codes::weight(code);
    }
    const int64_t up_to = sum_up_to(sum, lane), all = __shfl_sync(0xFFFFFFFF, up_to, hopper::WARP - 1);
    int64_t edges = 0;
    for (int box = FIRST_COUNTED_BOX + lane; box < list.sinks; box += hopper::WARP) {
        edges += codes::weight(list.codes[box]);
    }
    for (int box = max(list.local, FIRST_COUNTED_BOX) + lane; box < list.before; box += hopper::WARP) {
        edges += codes::weight(list.codes[box]);
    }
    // As in Tile::threshold, the number of codes that may be dropped is the least code that is kept.
    const int64_t total = p.part_weight + all + sum_of_warp(edges);
    const int64_t allowed = int64_t(p.part_of_dropped * (1 - double(p.share[list.head])) * double(total));
    int below = 0;
#pragma unroll
    for (int i = 0; i < CODES_EACH; ++i) below += up_to - sum + each[i] <= allowed;
    return min(sum_of_warp(below), codes::NUMBER - 1);
}

// The margins of four boxes, where the list that wants a box most decides.
struct Wanted {
    int margin[BOXES];

    __device__ __forceinline__ Wanted(const BoxStorage& shared, int first) {
#pragma unroll
        for (int i = 0; i < BOXES; ++i) margin[i] = -FORCED;
#pragma unroll
        for (int l = 0; l < LISTS; ++l) {
            const BoxList& list = shared.lists[l];
            const uint32_t codes = first < list.before ? *reinterpret_cast<const uint32_t*>(list.codes + first) : 0;
#pragma unroll
            for (int i = 0; i < BOXES; ++i) {
                const int box = first + i;
                const bool is_free = box >= list.sinks && box < list.local;
                const int code = codes >> i * 8 & 0xFF;
                const int wanted = is_free ? code - list.threshold : box < list.before ? FORCED : -FORCED;
                margin[i] = max(margin[i], wanted);
            }
        }
    }
};

// One block of lists.
struct Block {
    const BoxParams& p;
    BoxStorage& shared;
    const int kv_head, number;
    const int thread = threadIdx.x, warp = thread / hopper::WARP, lane = thread % hopper::WARP;

    __device__ __forceinline__ Block(const BoxParams& p, BoxStorage& shared, int kv_head, int number)
        : p(p), shared(shared), kv_head(kv_head), number(number) {}

    __device__ __forceinline__ int num_boxes() const { return shared.lists[LISTS - 1].before; }

    // Sum over the threads up to this one.
    __device__ __forceinline__ int sum_up_to_this(int value, int turn, int& total) {
        return sum_up_to(value, shared.numbers[turn], total, warp, lane);
    }

    __device__ __forceinline__ void count_margins() {
        shared.margins[thread] = 0;
        __syncthreads();
        for (int first = thread * BOXES; first < num_boxes(); first += BOX_THREADS * BOXES) {
            const Wanted wanted(shared, first);
#pragma unroll
            for (int i = 0; i < BOXES; ++i) {
                if (wanted.margin[i] >= 0) atomicAdd(&shared.margins[wanted.margin[i]], 1);
            }
        }
        __syncthreads();
    }

    // The least margin, from 0 on, such that all boxes with this or a larger margin fit; and how many boxes with the
    // margin just below it fit too.
    __device__ __forceinline__ int2 find_cut() {
        const int count = shared.margins[thread];
        int all, cut, above;
        const int or_more = count - sum_up_to_this(count, 0, all) + all;
        sum_up_to_this(or_more > p.max_boxes, 1, cut);
        __syncthreads();
        sum_up_to_this(thread >= cut ? count : 0, 0, above);
        return {cut, cut > 0 ? p.max_boxes - above : 0};
    }

    // Keep or drop four boxes. Returns which are kept.
    //   room: for those whose margin is one less than `cut`; it shrinks.
    __device__ __forceinline__ uint32_t choose(const Wanted& wanted, int cut, int& room) {
        uint32_t kept = 0, at_cut = 0;
#pragma unroll
        for (int i = 0; i < BOXES; ++i) {
            kept |= uint32_t(wanted.margin[i] >= cut) << i;
            at_cut |= uint32_t(cut > 0 && wanted.margin[i] == cut - 1) << i;
        }
        if (cut == 0) return kept;
        int total;
        int before = sum_up_to_this(__popc(at_cut), 0, total) - __popc(at_cut);
        for (; at_cut && before < room; at_cut &= at_cut - 1, ++before) kept |= at_cut & -at_cut;
        room -= min(total, room);
        return kept;
    }

    __device__ __forceinline__ void drop(int first, uint32_t kept) {
#pragma unroll
        for (int l = 0; l < LISTS; ++l) {
            const BoxList& list = shared.lists[l];
#pragma unroll
            for (int i = 0; i < BOXES; ++i) {
                const int box = first + i;
                if (!(kept >> i & 1) && box < list.before) list.words[box] = 0;
            }
        }
    }

    __device__ __forceinline__ void write(int2 found) {
        int32_t* next = p.numbers + kv_head * p.stride_numbers + number * p.stride_block;
        int room = found.y, count = 0;
        for (int begin = 0; begin < num_boxes(); begin += BOX_THREADS * BOXES) {
            const int first = begin + thread * BOXES;
            const Wanted wanted(shared, first);
            uint32_t kept = choose(wanted, found.x, room);
            drop(first, kept);
            int total;
            int32_t* target = next + count + sum_up_to_this(__popc(kept), 1, total) - __popc(kept);
            for (; kept; kept &= kept - 1) *target++ = first + __ffs(kept) - 1;
            count += total;
            __syncthreads();  // the next turn overwrites what this one has read
        }
        if (thread == 0) p.counts[kv_head * p.stride_counts + number] = count;
    }

    __device__ __forceinline__ void run() {
        BoxList list = find_list(p, kv_head, number * LISTS + warp);
        list.threshold = find_threshold(p, list, shared.tallies[warp], lane);
        if (lane == 0) shared.lists[warp] = list;
        __syncthreads();
        count_margins();
        const int2 found = find_cut();
        __syncthreads();
        write(found);
    }
};

__global__ void __launch_bounds__(BOX_THREADS) boxes_kernel(const __grid_constant__ BoxParams p) {
    extern __shared__ char raw[];
    // Blocks with the most boxes before them, which take longest, come first.
    const int block = p.num_blocks - 1 - blockIdx.x % p.num_blocks;
    Block(p, *reinterpret_cast<BoxStorage*>(raw), blockIdx.x / p.num_blocks, block).run();
}

inline cudaError_t launch_boxes(const BoxParams& p, int num_kv_heads, cudaStream_t stream) {
    constexpr int THREADS = BOX_THREADS, BYTES = sizeof(BoxStorage);
    const auto kernel = boxes_kernel;
    kernel<<<num_kv_heads * p.num_blocks, THREADS, BYTES, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace selection
