// SPDX-License-Identifier: Apache-2.0
// What the three parts of the attending kernel share: its arguments, its shared memory, the order of its work.
//
// A tile is 128 query rows of one head. Its kept keys come as a stream of stages of 128 keys: the tile's own keys, bands
// for both of its halves or for one, columns. docs/design.md says what is kept.
#pragma once

#include "hopper.cuh"

namespace attend {

constexpr int TILE = 128;
constexpr int HALF = 64;
constexpr int BAND = 16;
constexpr int BANDS_A_STAGE = TILE / BAND;
constexpr int BANDS_A_TILE = TILE / BAND;

// Kinds of bands and stages: seen by both halves, by the first, by the second.
constexpr int SHARED = 0;
constexpr int KINDS = 3;

// Room for numbers of tiles that are drawn: those that copy keys may be some tiles ahead of those that copy values.
constexpr int DRAWN = 4;

constexpr int KEYS = 0;
constexpr int VALUES = 1;

struct Params {
    CUtensorMap q_map, k_map, v_map;
    const char* k;  // for keys that are gathered one by one
    const char* v;
    const int32_t* block_table;  // this request's row
    void* out;
    float* lse;
    unsigned long long* kept_pairs;
    unsigned* num_drawn;  // tiles of this launch; zero before and after
    const int32_t* bands;
    const int32_t* bands_below;
    const uint8_t* band_halves;
    const int32_t* columns;
    const int32_t* columns_below;
    int64_t stride_page, stride_kv_head, stride_token;  // bytes
    int64_t stride_out_row, stride_out_head;            // elements
    int64_t stride_lse;
    int64_t stride_bands, stride_bands_kind, stride_below, stride_below_kind, stride_halves, stride_columns,
        stride_columns_below;
    int32_t page_size;
    int32_t num_rows, context_len;
    int32_t num_qo_heads, group;
    int32_t heads_a_wave;  // programs that run at once, over heads of a group
    float scale_log2;
};

template <int HEAD_DIM>
struct Shape {
    static constexpr int BLOCKS = HEAD_DIM / hopper::BOX_ELEMENTS;
    static constexpr int STAGES = HEAD_DIM == 128 ? 3 : 5;  // as many as shared memory holds
    static constexpr int KEY_BLOCK_BYTES = TILE * hopper::SWIZZLE_BYTES;
    static constexpr int QUERY_BLOCK_BYTES = HALF * hopper::SWIZZLE_BYTES;
    static constexpr int KEY_BYTES = BLOCKS * KEY_BLOCK_BYTES;
    static constexpr int QUERY_BYTES = BLOCKS * QUERY_BLOCK_BYTES;  // of one half
};

constexpr int THREADS = 3 * hopper::WARPGROUP;

// Registers a thread. Warpgroups can only take what others give of those that the kernel was launched with.
constexpr int LAUNCH_REGISTERS = (1 << 16) / THREADS / 8 * 8;
constexpr int CONSUMER_REGISTERS = 200;
constexpr int PRODUCER_REGISTERS = 104;
static_assert(2 * CONSUMER_REGISTERS + PRODUCER_REGISTERS <= 3 * LAUNCH_REGISTERS);

// Half of the producer warpgroup brings keys, the other half values.
constexpr int COPYING_THREADS = hopper::WARPGROUP / 2;
constexpr int COPYING_WARPS = COPYING_THREADS / hopper::WARP;
// Every copying thread, and once more each warp when it has written the mask.
constexpr int FULL_ARRIVALS = COPYING_THREADS + COPYING_WARPS;
// Every consuming warp; for a half that does not see a stage the producer arrives.
constexpr int WARPS_A_HALF = hopper::WARPGROUP / hopper::WARP;
constexpr int EMPTY_ARRIVALS = 2 * WARPS_A_HALF;

// One tile of one head, and how much of each list it may use.
struct Work {
    int head, kv_head, tile;
    int num_bands[KINDS];
    int num_columns;

    __device__ __forceinline__ int start_row() const { return tile * TILE; }

    // Whether the request ends within the tile: its own keys then are copied row by row.
    __device__ __forceinline__ bool is_cut_short(const Params& p) const {
        return start_row() + TILE > p.context_len + p.num_rows;
    }
};

template <int HEAD_DIM>
struct alignas(1024) Storage {
    using S = Shape<HEAD_DIM>;
    char q[2][S::QUERY_BYTES];
    char ring[2][S::STAGES][S::KEY_BYTES];  // of KEYS and of VALUES
    // One bit a key of a stage of columns: whether a half takes it from there.
    int32_t fresh[S::STAGES][2][TILE / 32];
    // Whoever sees a stage waits at a barrier that is filled for nobody else: no phase passes that it does not see.
    uint64_t full[2][S::STAGES][KINDS];
    uint64_t empty[2][S::STAGES];
    uint64_t q_full, q_empty;
    Work work;     // the tile whose queries `q` holds
    int is_over;  // whether that tile is one too many
    // What is drawn for the threads that copy: numbers of tiles.
    int drawn[DRAWN];
    uint64_t drawn_full[DRAWN], drawn_empty[DRAWN];
};

// Lane 0 reads for its warp, for it is lane 0 that says when its warp has read.
__device__ __forceinline__ int read_for_warp(const int& word, int lane) {
    int value = 0;
    if (lane == 0) value = word;
    return __shfl_sync(0xFFFFFFFF, value, 0);
}

// In what stages a tile's bands come. Most stages bring eight bands that both halves see, without a mask. What is left of
// those goes to each half with the bands that it alone sees, in private stages. A pair of private stages, one a half,
// takes two loads for the work of one: pairs are spread among the shared stages, to load at an even pace.
struct BandStages {
    int shared, rest;      // stages, and bands that fill no stage
    int bands[2], own[2];  // of each half's private stages, and how many stages that makes
    int pairs, shared_a_pair;

    __device__ __forceinline__ explicit BandStages(const Work& work)
        : shared(work.num_bands[SHARED] / BANDS_A_STAGE), rest(work.num_bands[SHARED] % BANDS_A_STAGE) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            bands[half] = rest + work.num_bands[1 + half];
            own[half] = (bands[half] + BANDS_A_STAGE - 1) / BANDS_A_STAGE;
        }
        // A half must not sit out two stages in a row: it leaves a slot of the ring two of its own stages later. The lists
        // of one estimate differ by four bands at most; others are evened out by empty stages.
        own[0] = max(own[0], own[1] - 1);
        own[1] = max(own[1], own[0] - 1);
        pairs = min(own[0], own[1]);
        shared_a_pair = pairs > 0 ? shared / pairs : 0;
    }

    __device__ __forceinline__ int total() const { return shared + own[0] + own[1]; }
};

// The bands of one stage: `count` of a kind, from `start` on. The consumers go through the stages in this order.
struct BandList {
    int kind, start, count;

    __device__ __forceinline__ BandList(const BandStages& stages, int stage) {
        const int round = stages.shared_a_pair + 2;
        int index;
        if (stage < stages.pairs * round) {
            const int in_round = stage % round - stages.shared_a_pair;
            kind = in_round < 0 ? SHARED : 1 + in_round;
            index = stage / round;
            if (kind == SHARED) index = index * stages.shared_a_pair + stage % round;
        } else if (stage < stages.shared + 2 * stages.pairs) {
            kind = SHARED;
            index = stage - 2 * stages.pairs;
        } else {
            kind = stages.own[0] > stages.own[1] ? 1 : 2;
            index = stage - stages.shared - stages.pairs;
        }
        start = index * BANDS_A_STAGE;
        count = kind == SHARED ? stages.shared * BANDS_A_STAGE : kind == 1 ? stages.bands[0] : stages.bands[1];
    }
};

// Row-key pairs that the halves of a tile attend to. `taken`: columns that a thread has brought for each half.
__device__ __forceinline__ long long count_pairs(const Params& p, const Work& work, const int (&taken)[2], bool first) {
    long long pairs = 0;
    for (int half = 0; half < 2; ++half) {
        const int begin = max(work.start_row() + half * HALF, p.context_len);
        const int end = min(work.start_row() + (half + 1) * HALF, p.context_len + p.num_rows);
        const long long rows = max(end - begin, 0);
        pairs += rows * taken[half];
        if (!first) continue;  // one thread counts what all have brought together
        const int in_bands = BAND * (work.num_bands[SHARED] + work.num_bands[1 + half]);
        pairs += rows * (in_bands + begin - work.start_row()) + rows * (rows + 1) / 2;
    }
    return pairs;
}

struct Order {
    int first_tile, num_tiles;

    __device__ __forceinline__ explicit Order(const Params& p)
        : first_tile(p.context_len / TILE), num_tiles((p.context_len + p.num_rows + TILE - 1) / TILE - first_tile) {}

    __device__ __forceinline__ int size(const Params& p) const { return num_tiles * p.num_qo_heads; }

    // Neighbouring programs are the heads of one KV group, then neighbouring tiles: they share keys in L2. The longest
    // tiles come first, so that the short ones fill the tail. From wave to wave a program moves on to the next head of
    // the group, since some heads keep more than others.
    __device__ __forceinline__ Work at(const Params& p, int id) const {
        const int tiles_before = id / p.group % num_tiles;
        Work work;
        work.kv_head = id / (p.group * num_tiles);
        work.tile = first_tile + num_tiles - 1 - tiles_before;
        work.head = work.kv_head * p.group + (id + tiles_before / p.heads_a_wave) % p.group;
        const int32_t* below = p.bands_below + work.head * p.stride_below + work.tile;
#pragma unroll
        for (int kind = 0; kind < KINDS; ++kind) work.num_bands[kind] = __ldg(below + kind * p.stride_below_kind);
        work.num_columns = __ldg(p.columns_below + work.head * p.stride_columns_below + work.tile);
        return work;
    }
};

}  // namespace attend
