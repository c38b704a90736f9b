// SPDX-License-Identifier: Apache-2.0
// What both passes of the probe share: arguments, the work of a program, its shared memory, the probe rows.
//
// A program (thread block) takes some of the heads that share a KV head, and a range of keys. A producer warp copies
// tiles of 128 consecutive keys into a ring in shared memory. Consumer warpgroups take the heads in turn, each head
// with its 64 probe rows.
#pragma once

#include "hopper.cuh"
#include "scale.cuh"

namespace probe {

constexpr int NUM_PROBES = 64;
constexpr int TILE = 128;        // keys
constexpr int QUERY_TILE = 128;  // rows
constexpr int BAND = 16;   // consecutive keys of one page, copied together
constexpr int BANDS = TILE / BAND;
constexpr int MAX_HEADS = 8;  // of one program, whose queries all stay in shared memory
constexpr int MAX_STAGES = 8;

constexpr int CONSUMERS = 4;  // warpgroups
constexpr int CONSUMER_THREADS = CONSUMERS * hopper::WARPGROUP;
constexpr int THREADS = CONSUMER_THREADS + hopper::WARPGROUP;
// Per thread. At launch each has 96: 4 x 112 + 32 = 5 x 96.
constexpr int CONSUMER_REGISTERS = 112;
constexpr int PRODUCER_REGISTERS = 32;

// Named barriers. __syncthreads uses number 0.
constexpr int ALL_CONSUMERS = 1;
constexpr int FIRST_TURN = 2;

// Which rows of the chunk are probed. minference_vllm/kernels/cuda/probe.py holds the same numbers.
enum class Which { LAST, SPREAD, HELD_OUT };

constexpr float NO_MAX = -1e30f;  // maximum of a row that has seen no key

struct Params {
    CUtensorMap k_map;
    const char* q;
    const int32_t* block_table;  // this request's row
    float* partial_max;          // [num_qo_heads, splits, NUM_PROBES], base 2
    float* partial_sum;
    float* lse;
    int32_t* vertical;
    int32_t* slash;
    int64_t stride_q_row, stride_q_head;  // bytes
    int64_t stride_lse, stride_mass;      // elements
    int32_t num_rows, context_len, page_size;
    int32_t num_kv_heads, group_size;
    int32_t batches, batch_size;          // of the heads of a group; a batch is at most MAX_HEADS
    int32_t splits, num_tiles, tiles_each;  // ranges of keys
    int32_t stages;
    int32_t accumulate;
    Which which;
    float scale_log2;
    fp8::Scale q_scale, k_scale;

    __device__ __forceinline__ int seq_len() const { return context_len + num_rows; }
};

// One program's share. Neighbouring programs read the same keys; the next ones read other heads' keys of the same
// tokens.
struct Job {
    int kv_head, first_head, num_heads;
    int split, first_tile, num_tiles;

    __device__ __forceinline__ explicit Job(const Params& p) {
        const int batch = blockIdx.x % p.batches;
        kv_head = blockIdx.x / p.batches % p.num_kv_heads;
        split = blockIdx.x / p.batches / p.num_kv_heads;
        first_head = kv_head * p.group_size + batch * p.batch_size;
        num_heads = min(p.batch_size, p.group_size - batch * p.batch_size);
        first_tile = split * p.tiles_each;
        num_tiles = min(p.tiles_each, p.num_tiles - first_tile);
    }
};

// The factor that makes a product of a query and a key, both of type T, a score to base 2.
template <typename T>
__device__ __forceinline__ float scale_log2_of(const Params& p, const Job& job) {
    if constexpr (std::is_same_v<T, hopper::E4M3>) {
        return p.scale_log2 * p.q_scale[job.kv_head] * p.k_scale[job.kv_head];
    } else {
        return p.scale_log2;
    }
}

// The rows that are probed: the last NUM_PROBES of the chunk, or as many spread evenly over it, or the held-out rows
// that measure recall (see minference_vllm/reference/recall.py).
struct Rows {
    int num_rows, context_len;
    Which which;

    __device__ __forceinline__ explicit Rows(const Params& p)
        : num_rows(p.num_rows), context_len(p.context_len), which(p.which) {}

    // Row of the chunk; negative if the chunk is too short to have it.
    __device__ __forceinline__ int row(int probe) const {
        if (which == Which::LAST) return num_rows - NUM_PROBES + probe;
        if (which == Which::SPREAD) return (probe + 1) * num_rows / NUM_PROBES - 1;
        const int near = context_len + (2 * probe + 1) * num_rows / (2 * NUM_PROBES);
        return min(max(near / 4 * 4 + near / QUERY_TILE % 4 - context_len, 0), num_rows - 1);
    }
    __device__ __forceinline__ int position(int probe) const { return context_len + row(probe); }

    // Position of the first probe row that the chunk has.
    __device__ __forceinline__ int first_position() const { return context_len + max(row(0), 0); }
};

// The probe row that is stored as row `place` of the queries in shared memory. The order suits the second pass, where a
// thread holds the columns 8 j + 2 t + {0, 1} of S^T = K Q^T. In this order they are the probe rows 4 i + t, so that
// much of a diagonal is in one thread.
__device__ __forceinline__ int probe_at(int place) { return (place & ~7) | (place & 1) << 2 | (place >> 1 & 3); }

// A row of queries or keys has ROW_BYTES.
template <int ROW_BYTES>
struct Shape {
    static constexpr int BLOCKS = ROW_BYTES / hopper::SWIZZLE_BYTES;  // of 128 bytes of each row
    static constexpr int KEY_BLOCK_BYTES = TILE * hopper::SWIZZLE_BYTES;
    static constexpr int KEY_BYTES = BLOCKS * KEY_BLOCK_BYTES;
    static constexpr int QUERY_BLOCK_BYTES = NUM_PROBES * hopper::SWIZZLE_BYTES;
    static constexpr int QUERY_BYTES = BLOCKS * QUERY_BLOCK_BYTES;
    static constexpr int STEPS_PER_BLOCK = hopper::SWIZZLE_BYTES / hopper::MMA_BYTES;
};

struct Barriers {
    uint64_t full[MAX_STAGES], empty[MAX_STAGES];
};

// Bytes that a pass keeps for each head. The first pass keeps four floats per thread, the second pass log-sum-exps.
constexpr int HEAD_BYTES = hopper::WARPGROUP * 4 * sizeof(float);

template <int ROW_BYTES>
__host__ __device__ constexpr int shared_bytes(int heads, int stages) {
    return stages * Shape<ROW_BYTES>::KEY_BYTES + heads * (Shape<ROW_BYTES>::QUERY_BYTES + HEAD_BYTES) + sizeof(Barriers);
}

// The parts of dynamic shared memory. Their sizes depend on the number of heads and stages.
template <int ROW_BYTES>
struct Shared {
    using S = Shape<ROW_BYTES>;
    char *keys, *queries, *heads;
    Barriers* barriers;

    __device__ __forceinline__ Shared(char* raw, const Params& p) {
        // Swizzle atoms must begin at multiples of 1024 bytes, which dynamic shared memory need not do.
        keys = raw + (-hopper::shared_address(raw) & (hopper::ATOM_BYTES - 1));
        queries = keys + p.stages * S::KEY_BYTES;
        heads = queries + p.batch_size * S::QUERY_BYTES;
        barriers = reinterpret_cast<Barriers*>(heads + p.batch_size * HEAD_BYTES);
    }
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

}  // namespace probe
