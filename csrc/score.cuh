// SPDX-License-Identifier: Apache-2.0
// Scores of sampled rows against means of keys: arguments, the work of a program, its shared memory.
//
// A half has 16, 32 or 64 sampled rows, in parts of 16 that follow each other. A list is one part for one head: its 16
// rows, and the groups before their tile. A program (thread block) takes a block of 16 lists of one KV head, 256 rows
// that stay in shared memory, and a range of means. A producer warp copies means into a ring, and two consumer
// warpgroups take 8 lists each.
//
// A group is always four means, of keys at one of two scales. Finely, a mean is of 4 keys and a group has 16 keys.
// Coarsely, a mean is of 32 keys and a group is a box of 128 keys (BOX in minference_vllm/boxes.py). The coarse masses
// decide which boxes of a block are scored finely; `boxes` then lists their numbers.
#pragma once

#include "hopper.cuh"
#include "scale.cuh"

namespace score {

constexpr int TILE = 128;  // rows, or keys
constexpr int HALF = 64;
constexpr int MEANS_PER_GROUP = 4;

constexpr int ROWS = 16;  // of a list

constexpr int CONSUMERS = 2;  // warpgroups
constexpr int LISTS_PER_CONSUMER = 8;
constexpr int LISTS = CONSUMERS * LISTS_PER_CONSUMER;
constexpr int COLUMNS = LISTS_PER_CONSUMER * ROWS;  // of a consumer's scores: rows of queries

// Means are copied in boxes of 8 groups.
constexpr int BOX_GROUPS = 8;
constexpr int BOX_MEANS = BOX_GROUPS * MEANS_PER_GROUP;
constexpr int STAGE_BOXES = 4;
constexpr int STAGE_GROUPS = STAGE_BOXES * BOX_GROUPS;
constexpr int STAGE_MEANS = STAGE_BOXES * BOX_MEANS;
// The box number of a place in a stage that no box fills. Its groups lie past those of every list, so that their masses
// are not stored.
constexpr int NO_BOX = 1 << 27;

constexpr int THREADS = (CONSUMERS + 1) * hopper::WARPGROUP;
// Per thread. At launch each has 168: 2 x 240 + 24 = 3 x 168.
constexpr int CONSUMER_REGISTERS = 240;
constexpr int PRODUCER_REGISTERS = 24;

struct Params {
    CUtensorMap means_map;
    const char* q;
    const float* row_lse;
    uint8_t* masses;
    const int32_t *boxes, *box_counts;          // of each KV head and block; null: all boxes
    int64_t stride_q_row, stride_q_head;        // bytes
    int64_t stride_lse;                         // elements
    int64_t stride_masses, stride_masses_part;  // bytes
    int64_t stride_boxes_set, stride_boxes, stride_box_counts;  // elements
    int32_t num_rows, context_len;
    int32_t row_stride;                         // distance between sampled rows: 4, 2 or 1
    int32_t num_kv_heads, group_size;           // query heads that share a KV head
    int32_t num_lists, num_blocks;              // of a KV head; a block is LISTS lists
    int32_t stages_each;                        // of a range of means
    int32_t max_stages;                         // of a block that `boxes` names
    int32_t num_boxes;                          // of means before the chunk's last tile
    int32_t groups_per_tile;
    float scale_log2, log2_mean;                // log2 of the number of keys in a mean
    float plain, squared;  // mass that a stored weight W adds: plain * W (1 + squared * W), see UNIT
    fp8::Scale q_scale, k_scale;                // of queries in FP8, and of the keys

    __host__ __device__ __forceinline__ int first_tile() const { return context_len / TILE; }
    // Lists of a part are neighbours, so that those of a block see about the same means.
    __host__ __device__ __forceinline__ int part(int list) const { return list / group_size; }
    __host__ __device__ __forceinline__ int tile(int part) const {
        return first_tile() + part * ROWS * row_stride / TILE;
    }
    // Groups before a list's tile.
    __host__ __device__ __forceinline__ int num_groups(int list) const {
        return tile(part(list)) * groups_per_tile;
    }

    // An upper bound of a block's stages: what its last list needs, or what `boxes` has room for if that is less.
    __host__ __device__ __forceinline__ int num_stages(int block) const {
        const int end = (block + 1) * LISTS, last_list = (end < num_lists ? end : num_lists) - 1;
        const int all = (num_groups(last_list) + STAGE_GROUPS - 1) / STAGE_GROUPS;
        return boxes && max_stages < all ? max_stages : all;
    }
};

// Where a list lies.
struct List {
    int part;  // counted from the chunk's first tile
    int head;  // counted among the heads that share the KV head

    __device__ __forceinline__ List(const Params& p, int list)
        : part(p.part(list)), head(list - part * p.group_size) {}
};

// One program's share. Programs that run at the same time read the same range of means. Blocks with the most means come
// first.
struct Job {
    int first_list, kv_head;
    int first_head;  // of those that share the KV head
    int first_stage, num_stages;  // of a range of means; no stages if it lies past what the lists see
    const int32_t* boxes;         // of the block
    int num_boxes;

    __device__ __forceinline__ explicit Job(const Params& p) {
        const int block = p.num_blocks - 1 - blockIdx.x % p.num_blocks;
        kv_head = blockIdx.x / p.num_blocks % p.num_kv_heads;
        first_list = block * LISTS;
        first_head = kv_head * p.group_size;
        first_stage = blockIdx.x / p.num_blocks / p.num_kv_heads * p.stages_each;
        boxes = p.boxes ? p.boxes + kv_head * p.stride_boxes_set + block * p.stride_boxes : nullptr;
        num_boxes = boxes ? __ldg(p.box_counts + kv_head * p.stride_box_counts + block) : 0;
        const int of_block = boxes ? (num_boxes + STAGE_BOXES - 1) / STAGE_BOXES : p.num_stages(block);
        num_stages = min(p.stages_each, of_block - first_stage);
    }

    // The number of the box at a place in the block's stages.
    __device__ __forceinline__ int box(int place) const {
        if (!boxes) return place;
        return place < num_boxes ? __ldg(boxes + place) : NO_BOX;
    }
};

// Which row of the chunk is the i-th of a part. The offset changes from tile to tile. With a constant one, the rows of
// a text that repeats with their period would meet the same words everywhere. Rows that the chunk does not have are
// replaced by its first or its last.
__device__ __forceinline__ int sampled_row(const Params& p, int part, int i) {
    const int offset = (p.tile(part) * 5 + 3) & (p.row_stride - 1);
    const int row = p.first_tile() * TILE + (part * ROWS + i) * p.row_stride + offset;
    return min(max(row - p.context_len, 0), p.num_rows - 1);
}

// Column c of a consumer's scores holds row `row_of(c)` of its list `list_of(c)`. A thread of a wgmma accumulator holds
// the columns 8 j + 2 t + {0, 1}, which in this order are all rows of the lists 2 t and 2 t + 1.
__device__ __forceinline__ int list_of(int column) { return (column >> 1 & 3) * 2 + (column >> 6); }
__device__ __forceinline__ int row_of(int column) { return (column >> 3 & 7) * 2 + (column & 1); }

// A row of queries or means, as the tensor cores read it, has ROW_BYTES.
template <int ROW_BYTES>
struct Shape {
    static constexpr int BLOCKS = ROW_BYTES / hopper::SWIZZLE_BYTES;  // of 128 bytes a row
    static constexpr int BOX_BYTES = BOX_MEANS * hopper::SWIZZLE_BYTES;  // of one block
    static constexpr int STAGE_BLOCK_BYTES = STAGE_BOXES * BOX_BYTES;
    static constexpr int STAGE_BYTES = BLOCKS * STAGE_BLOCK_BYTES;
    static constexpr int QUERY_BLOCK_BYTES = COLUMNS * hopper::SWIZZLE_BYTES;
    static constexpr int QUERY_BYTES = BLOCKS * QUERY_BLOCK_BYTES;
    static constexpr int STEPS_PER_BLOCK = hopper::SWIZZLE_BYTES / hopper::MMA_BYTES;
    static constexpr int STAGES = 8 / BLOCKS;
};

template <int ROW_BYTES>
struct Storage {
    using S = Shape<ROW_BYTES>;
    alignas(hopper::ATOM_BYTES) char queries[CONSUMERS][S::QUERY_BYTES];
    char means[S::STAGES][S::STAGE_BYTES];
    int boxes[S::STAGES][STAGE_BOXES];
    uint64_t full[S::STAGES], empty[S::STAGES];
};

// A place in the ring and the parity of its barriers' phase.
struct Ring {
    int slot = 0;
    uint32_t phase = 0;

    __device__ __forceinline__ void advance(int stages) {
        if (++slot == stages) {
            slot = 0;
            phase ^= 1;
        }
    }
};

}  // namespace score
