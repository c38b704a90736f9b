// SPDX-License-Identifier: Apache-2.0
// What the parts of the attention kernel share: its arguments, its shared memory, the stages of a tile, the order of
// tiles.
//
// A tile is 128 query rows of one head, in two halves of 64. The keys that it keeps come in stages of 128: first the
// tile's own keys (the causal diagonal block), then groups of 16 that both halves or only one of them keeps, then
// single columns.
// minference_vllm/index.py defines what is kept, attend_index.cuh reads it.
#pragma once

#include "hopper.cuh"
#include "scale.cuh"

namespace attend {

constexpr int TILE = 128;
constexpr int HALF = 64;
constexpr int GROUP = 16;  // consecutive keys from a multiple of 16 on, so that they never straddle two pages
constexpr int GROUPS_PER_TILE = TILE / GROUP;
constexpr int GROUPS_PER_STAGE = TILE / GROUP;

// Kinds of groups and of stages: SHARED by both halves, or private to one (1 + half).
constexpr int SHARED = 0;
constexpr int KINDS = 3;

constexpr int NO_MORE = -1;  // in place of a kind: no stage follows

constexpr int KEYS = 0;
constexpr int VALUES = 1;

// One request's chunk and its cache.
struct Params {
    CUtensorMap q_map, k_map, v_map;
    const char* k;  // for keys that are copied one by one
    const char* v;
    const int32_t* block_table;  // this request's row
    const void* sinks;           // a score per query head that joins each row's softmax; null if there are none
    void* out;
    float* lse;
    unsigned long long* kept_pairs;
    unsigned* tile_counter;                             // zero before and after a launch
    int64_t stride_page, stride_kv_head, stride_token;  // bytes
    int64_t stride_out_row, stride_out_head;            // elements
    int64_t stride_lse;
    int32_t page_size;
    int32_t num_rows, context_len;
    int32_t num_qo_heads;
    int32_t group_size;      // query heads that share a KV head
    int32_t tiles_per_wave;  // tiles that run at the same time, each for all heads of a group
    int32_t sinks_are_fp32;  // otherwise they have the output's type
    float scale_log2;
    fp8::Scale q_scale, k_scale, v_scale;
};

constexpr int THREADS = 3 * hopper::WARPGROUP;
constexpr int LAUNCH_REGISTERS = (1 << 16) / THREADS / 8 * 8;  // per thread

// Sizes for queries, keys and values of type `Stored`, HEAD_DIM elements per row.
//
// The tensor cores multiply values in 16 bits. Values in FP8 are copied as they are and then converted into a second
// ring.
template <typename Stored, int HEAD_DIM>
struct Shape {
    static constexpr bool CONVERTS = std::is_same_v<Stored, hopper::E4M3>;
    static constexpr int ROW_BYTES = HEAD_DIM * sizeof(Stored);
    static constexpr int SWIZZLE_BYTES = ROW_BYTES < hopper::SWIZZLE_BYTES ? ROW_BYTES : hopper::SWIZZLE_BYTES;
    // A longer row is cut into blocks of one swizzled row each; block b of all rows comes before block b + 1 of any.
    static constexpr int BLOCKS = ROW_BYTES / SWIZZLE_BYTES;
    static constexpr int BOX_ELEMENTS = SWIZZLE_BYTES / sizeof(Stored);
    static constexpr int STAGES = HEAD_DIM == 128 ? 3 : 5;  // as many as fit in shared memory
    static constexpr int KEY_BLOCK_BYTES = TILE * SWIZZLE_BYTES;
    static constexpr int QUERY_BLOCK_BYTES = HALF * SWIZZLE_BYTES;
    static constexpr int KEY_BYTES = BLOCKS * KEY_BLOCK_BYTES;
    static constexpr int QUERY_BYTES = BLOCKS * QUERY_BLOCK_BYTES;  // of one half
    static constexpr int VALUE_BLOCK_BYTES = TILE * hopper::SWIZZLE_BYTES;
    static constexpr int VALUE_BYTES = TILE * HEAD_DIM * 2;

    // Half of the producer warpgroup copies keys, the other half copies values. FP8 has half as many bytes, so a
    // quarter copies keys, a quarter copies values, and the other half converts values.
    static constexpr int COPYING_THREADS = hopper::WARPGROUP / (CONVERTS ? 4 : 2);
    static constexpr int COPYING_WARPS = COPYING_THREADS / hopper::WARP;
    // A stage is full after an arrival of every copying thread and one more of each copying warp. For rows, a thread
    // arrives when its cp.async have landed, and a warp when it has written its part of the mask. For groups, thread 0
    // arrives in place of all threads, and each warp arrives with the bytes that its boxes will bring.
    static constexpr int FULL_ARRIVALS = COPYING_THREADS + COPYING_WARPS;
    // Each of these warps arrives twice per stage: at `empty` of the stored values that it has read, and at
    // `converted_full` of the values that it has written.
    static constexpr int CONVERTING_WARPS = hopper::WARPGROUP / hopper::WARP - 2 * COPYING_WARPS;

    // Registers per thread. The consumers can only have more than at launch if the producer gives up as many.
    static constexpr int CONSUMER_REGISTERS = CONVERTS ? 192 : 200;
    static constexpr int PRODUCER_REGISTERS = CONVERTS ? 120 : 104;
    static_assert(2 * CONSUMER_REGISTERS + PRODUCER_REGISTERS <= 3 * LAUNCH_REGISTERS);
};

// A slot is empty when every consumer warp has arrived. The producer warpgroup arrives for a half that skips the stage.
constexpr int WARPS_PER_HALF = hopper::WARPGROUP / hopper::WARP;
constexpr int EMPTY_ARRIVALS = 2 * WARPS_PER_HALF;

// Tile numbers that can be in flight: the threads that copy keys may be some tiles ahead of those that copy values.
constexpr int MAX_DRAWN = 4;

// One tile of one head, and how many groups of each kind and how many columns it keeps.
struct Work {
    int head, kv_head, tile;
    int num_groups[KINDS];
    int num_columns;

    __device__ __forceinline__ int start_row() const { return tile * TILE; }

    // Whether the request ends within the tile. What lies behind its last key is garbage, perhaps NaN. The tile's own
    // keys are then copied row by row, with the last key in place of those that are missing.
    __device__ __forceinline__ bool is_cut_short(const Params& p) const {
        return start_row() + TILE > p.context_len + p.num_rows;
    }
};

// Values that are converted before they are multiplied.
template <typename Stored, int HEAD_DIM>
struct Converted {
    using S = Shape<Stored, HEAD_DIM>;
    char converted[S::STAGES][S::VALUE_BYTES];
    int kinds[S::STAGES];  // of the stages in the ring, for the threads that convert their values, or NO_MORE
    uint64_t converted_full[S::STAGES][KINDS], converted_empty[S::STAGES];
};
struct Nothing {};

template <typename Stored, int HEAD_DIM>
struct alignas(1024) Storage
    : std::conditional_t<Shape<Stored, HEAD_DIM>::CONVERTS, Converted<Stored, HEAD_DIM>, Nothing> {
    using S = Shape<Stored, HEAD_DIM>;
    alignas(1024) char q[2][S::QUERY_BYTES];
    char ring[2][S::STAGES][S::KEY_BYTES];  // of KEYS and of VALUES, as they are stored
    // For a stage of columns, one bit per key and half. A cleared bit masks the key: it is already in one of the half's
    // groups and must not count twice, or the stage has no key there.
    int32_t fresh[S::STAGES][2][TILE / 32];
    // One barrier per kind of stage. A half skips the other half's private stages. With one barrier for all kinds it
    // would miss phases, and by parity alone it could not tell whether the phase that it waits for has come. The
    // threads that convert values skip no stage, so they wait for the barrier of SHARED whatever the kind.
    uint64_t full[2][S::STAGES][KINDS];
    uint64_t empty[2][S::STAGES];
    uint64_t q_full, q_empty;
    Work work;             // the tile whose queries `q` holds
    int is_over;           // whether that tile is past the last, which tells the consumers to stop
    int drawn[MAX_DRAWN];  // tile numbers, for the threads that copy
    uint64_t drawn_full[MAX_DRAWN], drawn_empty[MAX_DRAWN];

    // The slots and barriers of the values that the tensor cores read.
    __device__ __forceinline__ char* values(int slot) {
        if constexpr (S::CONVERTS) return this->converted[slot];
        else return ring[VALUES][slot];
    }
    __device__ __forceinline__ uint64_t* values_full(int slot, int kind) {
        if constexpr (S::CONVERTS) return &this->converted_full[slot][kind];
        else return &full[VALUES][slot][kind];
    }
    __device__ __forceinline__ uint64_t* values_empty(int slot) {
        if constexpr (S::CONVERTS) return &this->converted_empty[slot];
        else return &empty[VALUES][slot];
    }
};

// Lane 0 reads for its warp, because it is also lane 0 that arrives at the barrier to say that the warp has read.
__device__ __forceinline__ int read_for_warp(const int& word, int lane) {
    int value = 0;
    if (lane == 0) value = word;
    return __shfl_sync(0xFFFFFFFF, value, 0);
}

// How a tile's groups are divided into stages. Most stages hold eight groups that both halves keep and need no mask.
// The groups that then remain of these are loaded twice: each half gets them in private stages, with the groups that it
// alone keeps. Private stages come in pairs, one for each half, which compute at the same time. A pair loads two stages
// for the work of one, so pairs are spread evenly among the shared stages to keep the load on L2 even.
struct Stages {
    int shared, rest;        // shared stages, and shared groups that fill no whole stage
    int groups[2], own[2];   // groups in each half's private stages, and the number of these stages
    int pairs, shared_per_pair;

    //   columns_follow: both halves have more stages after these.
    __device__ __forceinline__ Stages(const Work& work, bool columns_follow)
        : shared(work.num_groups[SHARED] / GROUPS_PER_STAGE), rest(work.num_groups[SHARED] % GROUPS_PER_STAGE) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            groups[half] = rest + work.num_groups[1 + half];
            own[half] = (groups[half] + GROUPS_PER_STAGE - 1) / GROUPS_PER_STAGE;
        }
        // A half adds a stage's values during its next stage, and occupies their slot until then. If it skipped many
        // stages of the other half in between, the ring would run out of slots, and the other half, which is waiting
        // for one, would never get to the stage that both need next. Empty stages keep the two numbers close. They are
        // rare: the lists that bands.py makes differ by four at most. If nothing follows, the shorter half ends
        // the tile instead, which frees its slots.
        if (columns_follow) {
            own[0] = max(own[0], own[1] - 1);
            own[1] = max(own[1], own[0] - 1);
        }
        pairs = min(own[0], own[1]);
        shared_per_pair = pairs > 0 ? shared / pairs : 0;
    }

    __device__ __forceinline__ int total() const { return shared + own[0] + own[1]; }
};

// Which groups a stage holds: those from `start` on in a list of `count` groups. Producer and consumers agree on this
// order: rounds of shared stages and a pair, the remaining shared stages, the private stages that one half has more of.
struct StageGroups {
    int kind, start, count;

    __device__ __forceinline__ StageGroups(const Stages& stages, int stage) {
        const int round = stages.shared_per_pair + 2;
        int index;
        if (stage < stages.pairs * round) {
            const int in_round = stage % round - stages.shared_per_pair;
            kind = in_round < 0 ? SHARED : 1 + in_round;
            index = stage / round;
            if (kind == SHARED) index = index * stages.shared_per_pair + stage % round;
        } else if (stage < stages.shared + 2 * stages.pairs) {
            kind = SHARED;
            index = stage - 2 * stages.pairs;
        } else {
            kind = stages.own[0] > stages.own[1] ? 1 : 2;
            index = stage - stages.shared - stages.pairs;
        }
        start = index * GROUPS_PER_STAGE;
        count = kind == SHARED ? stages.shared * GROUPS_PER_STAGE : kind == 1 ? stages.groups[0] : stages.groups[1];
    }
};

// Row-key pairs that a tile attends to. Each copying thread counts the columns that it has copied for either half; one
// of them, the `first`, also counts everything else.
__device__ __forceinline__ long long count_pairs(
    const Params& p, const Work& work, const int (&columns)[2], bool first
) {
    long long pairs = 0;
    for (int half = 0; half < 2; ++half) {
        const int begin = max(work.start_row() + half * HALF, p.context_len);
        const int end = min(work.start_row() + (half + 1) * HALF, p.context_len + p.num_rows);
        const long long rows = max(end - begin, 0);
        pairs += rows * columns[half];
        if (!first) continue;
        // A row attends to its half's groups and to the tile's own keys up to itself.
        const int in_groups = GROUP * (work.num_groups[SHARED] + work.num_groups[1 + half]);
        pairs += rows * (in_groups + begin - work.start_row()) + rows * (rows + 1) / 2;
    }
    return pairs;
}

// In which order the tiles of all heads are computed.
struct Order {
    int first_tile, num_tiles, num_heads;

    template <typename Index>
    __device__ __forceinline__ Order(const Params& p, const Index& index)
        : first_tile(p.context_len / TILE),
          num_tiles((p.context_len + p.num_rows + TILE - 1) / TILE - first_tile),
          num_heads(p.num_qo_heads) {
        if constexpr (Index::LISTS_HEADS) num_heads = __ldg(index.num_heads);
    }

    __device__ __forceinline__ int size() const { return num_tiles * num_heads; }

    // The heads of one KV head follow each other, then those of the neighbouring tile: they run at the same time and
    // share keys in L2. The longest tiles come first, so that short ones keep all programs busy at the end. The last
    // `long_tiles` may be far longer than all others; for every head they come before any other tile. Each time the
    // programs have been through the heads of a group, the heads are rotated. Some heads keep more than others, and
    // without the rotation the same programs would always get those.
    template <typename Index>
    __device__ __forceinline__ Work at(const Params& p, const Index& index, int id) const {
        Work work;
        if constexpr (Index::LISTS_HEADS) {
            // The heads are few, and their order does not matter: all of them for one tile, then for the one before.
            work.tile = first_tile + num_tiles - 1 - id / num_heads;
            work.head = __ldg(index.heads + id % num_heads);
            work.kv_head = work.head / p.group_size;
        } else {
            // A stretch is the tiles that come before all others, or the rest.
            const int ahead = min(index.long_tiles, num_tiles), of_ahead = ahead * num_heads;
            const bool is_ahead = id < of_ahead;
            const int place = is_ahead ? id : id - of_ahead, stretch = is_ahead ? ahead : num_tiles - ahead;
            const int tiles_before = place / p.group_size % stretch;
            work.kv_head = place / (p.group_size * stretch);
            work.tile = first_tile + num_tiles - 1 - tiles_before - (is_ahead ? 0 : ahead);
            work.head = work.kv_head * p.group_size + (place + tiles_before / p.tiles_per_wave) % p.group_size;
        }
        index.count(work);
        return work;
    }
};

}  // namespace attend
