// SPDX-License-Identifier: Apache-2.0
// Makes the list of groups that a tile keeps from the masses of groups. Both halves of the tile keep the same. There is
// a program (thread block) for each tile and head. The reference is minference_vllm/reference/groups.py.
//
// The codes of all parts are read once, sixteen at a time. The codes of their sums replace those of the first part and
// are read again from there.
#pragma once

#include "codes.cuh"
#include "hopper.cuh"

namespace selection {

constexpr int TILE = 128;
constexpr int HALF = 64;
constexpr int GROUPS_PER_TILE = 8;
constexpr int EVERY_GROUP = -1;

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * hopper::WARP;
static_assert(THREADS == codes::NUMBER);  // thread i counts the groups of code i
constexpr int PIECE = 16;                 // codes per load

struct Params {
    uint8_t* masses;
    const float* share;
    int32_t *groups, *counts;
    int64_t stride_masses, stride_part, stride_groups, stride_groups_tile, stride_counts;
    int64_t rows_weight;  // of all sampled rows of a tile
    int32_t num_tiles, num_rows, context_len;
    int32_t sink_groups, local_groups, long_groups, first_counted, max_kept;
};

struct Storage {
    int32_t tallies[WARPS][codes::NUMBER];  // one per warp, so that fewer threads contend
    int64_t sums[2][WARPS];
    int32_t numbers[2][WARPS];
};

struct Sixteen {
    uint4 packed;

    __device__ __forceinline__ uint32_t word(int i) const {
        return i == 0 ? packed.x : i == 1 ? packed.y : i == 2 ? packed.z : packed.w;
    }
    __device__ __forceinline__ uint32_t code(int i) const { return word(i / 4) >> i % 4 * 8 & 0xFF; }
    __device__ __forceinline__ bool are_zero() const { return (packed.x | packed.y | packed.z | packed.w) == 0; }
};

__device__ __forceinline__ Sixteen load(const uint8_t* at) { return {*reinterpret_cast<const uint4*>(at)}; }

// The parts of a half.
template <int PARTS>
struct Half {
    Sixteen part[PARTS];

    __device__ __forceinline__ Half(const uint8_t* at, int64_t stride) {
#pragma unroll
        for (int i = 0; i < PARTS; ++i) part[i] = load(at + i * stride);
    }
    __device__ __forceinline__ bool are_zero() const {
        bool zero = true;
#pragma unroll
        for (int i = 0; i < PARTS; ++i) zero &= part[i].are_zero();
        return zero;
    }
    // Neighbours are added, then their sums.
    __device__ __forceinline__ float mass(int i) const {
        float sum[PARTS];
#pragma unroll
        for (int j = 0; j < PARTS; ++j) sum[j] = codes::decode(part[j].code(i));
#pragma unroll
        for (int step = 1; step < PARTS; step *= 2) {
#pragma unroll
            for (int j = 0; j < PARTS; j += 2 * step) sum[j] += sum[j + step];
        }
        return sum[0];
    }
};

// The sum of the values of this lane and of the lanes before it in the warp.
template <typename T>
__device__ __forceinline__ T sum_up_to(T value, int lane) {
#pragma unroll
    for (int step = 1; step < hopper::WARP; step *= 2) {
        const T before = __shfl_sync(0xFFFFFFFF, value, max(lane - step, 0));
        if (lane >= step) value += before;
    }
    return value;
}

// The same over all threads of a program of NUM_WARPS warps; `total` receives the sum of all. Two calls that follow
// each other need different `sums`, since slow threads may still read those of the first.
template <typename T, int NUM_WARPS>
__device__ __forceinline__ T sum_up_to(T value, T (&sums)[NUM_WARPS], T& total, int warp, int lane) {
    value = sum_up_to(value, lane);
    if (lane == hopper::WARP - 1) sums[warp] = value;
    __syncthreads();
    total = 0;
#pragma unroll
    for (int i = 0; i < NUM_WARPS; ++i) {
        if (i < warp) value += sums[i];
        total += sums[i];
    }
    return value;
}

// One tile of one head.
template <int PARTS>
struct Tile {
    const Params& p;
    Storage& shared;
    const int thread = threadIdx.x, warp = thread / hopper::WARP, lane = thread % hopper::WARP;
    const int head, tile;
    const int start_row = (p.context_len / TILE + tile) * TILE;
    const int num_groups = start_row / TILE * GROUPS_PER_TILE;
    // Only groups from `sinks` to `local` may be dropped: those of them that have little mass.
    const int sinks = min(p.sink_groups, num_groups), local = max(num_groups - p.local_groups, sinks);
    // A half of which the chunk has no row takes the other half's masses, so these count twice.
    const int first_half = start_row + HALF <= p.context_len ? 1 : 0;
    const int second_half = start_row + HALF >= p.context_len + p.num_rows ? 0 : 1;
    uint8_t* const sums = p.masses + head * p.stride_masses + part_of(first_half) * p.stride_part;
    const uint8_t* const second = p.masses + head * p.stride_masses + part_of(second_half) * p.stride_part;

    __device__ __forceinline__ Tile(const Params& p, Storage& shared, int head, int tile)
        : p(p), shared(shared), head(head), tile(tile) {}

    __device__ __forceinline__ int64_t part_of(int half) const { return (tile * 2 + half) * PARTS; }

    // Add the parts' masses, and count how many of the groups that may be dropped have each code other than 0.
    __device__ __forceinline__ void add_parts() {
        for (int i = lane; i < codes::NUMBER; i += hopper::WARP) shared.tallies[warp][i] = 0;
        __syncwarp();
        for (int start = thread * PIECE; start < num_groups; start += THREADS * PIECE) {
            const Half<PARTS> first(sums + start, p.stride_part), other(second + start, p.stride_part);
            uint32_t words[PIECE / 4] = {};
            if (!(first.are_zero() && other.are_zero())) {
#pragma unroll
                for (int i = 0; i < PIECE; ++i) {
                    const int code = codes::encode(first.mass(i) + other.mass(i)), group = start + i;
                    words[i / 4] |= uint32_t(code) << i % 4 * 8;
                    if (code > 0 && group >= sinks && group < local) atomicAdd(&shared.tallies[warp][code], 1);
                }
            }
            *reinterpret_cast<uint4*>(sums + start) = make_uint4(words[0], words[1], words[2], words[3]);
        }
        __syncthreads();
    }

    __device__ __forceinline__ int64_t weight_between(int begin, int end) const {
        int64_t weight = 0;
        for (int group = begin + thread; group < end; group += THREADS) weight += codes::weight(sums[group]);
        return weight;
    }

    // The least code that is kept, and how many groups are kept.
    __device__ __forceinline__ int2 threshold() {
        int count = 0;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) count += shared.tallies[i][thread];
        int64_t all, edges;
        const int64_t dropped = sum_up_to(count * codes::weight(thread), shared.sums[0], all, warp, lane);
        // `all` is the mass of the groups that may be dropped. The total must hold that of every group which no row's
        // normaliser has seen. So groups that are always kept are added unless the normaliser has seen them, and groups
        // that may be dropped are subtracted if it has.
        const int64_t edge = weight_between(max(local, p.first_counted), num_groups) +
                             weight_between(p.first_counted, sinks) -
                             weight_between(sinks, min(p.first_counted, local));
        sum_up_to(edge, shared.sums[1], edges, warp, lane);
        const double total = double(p.rows_weight + all + edges);
        const double drops = 1 - double(p.share[head]);
        // The reference multiplies in the same order. This thread's `dropped` is the mass of its code and all smaller
        // ones. Both sides of its product grow with the code, so the number of threads whose groups may be dropped is
        // the least code that is kept.
        const double gone = double(dropped);
        const double compared = double(max(num_groups, p.long_groups));
        const double heaviness = double(codes::weight(thread)) * compared;
        const double limit = drops * drops * drops * total * total * total * double(num_groups);
        const bool is_below = gone * gone * heaviness * compared <= limit;
        int counted, below, least;
        sum_up_to(is_below ? 1 : 0, shared.numbers[0], least, warp, lane);
        least = min(least, codes::NUMBER - 1);
        sum_up_to(count, shared.numbers[1], counted, warp, lane);
        __syncthreads();
        sum_up_to(thread < least ? count : 0, shared.numbers[0], below, warp, lane);
        const int of_no_mass = local - sinks - counted;
        return {least, num_groups - below - (least > 0 ? of_no_mass : 0)};
    }

    // Bit i: whether the i-th of sixteen groups is kept.
    __device__ __forceinline__ uint32_t kept(int start, int least) const {
        if (start >= num_groups) return 0;
        const Sixteen sixteen = load(sums + start);
        uint32_t bits = 0;
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
            const int group = start + i;
            const bool is_kept = int(sixteen.code(i)) >= least || group < sinks || group >= local;
            bits |= uint32_t(is_kept && group < num_groups) << i;
        }
        return bits;
    }

    __device__ __forceinline__ void list(int least) {
        int32_t* next = p.groups + head * p.stride_groups + tile * p.stride_groups_tile;
        for (int begin = 0, turn = 0; begin < num_groups; begin += THREADS * PIECE, turn ^= 1) {
            const int start = begin + thread * PIECE;
            uint32_t bits = kept(start, least);
            const int count = __popc(bits);
            int total;
            int32_t* target = next + sum_up_to(count, shared.numbers[turn], total, warp, lane) - count;
            for (; bits; bits &= bits - 1) *target++ = start + __ffs(bits) - 1;
            next += total;
        }
    }

    __device__ __forceinline__ void run() {
        add_parts();
        const int2 found = threshold();
        const bool fits = found.y <= p.max_kept;
        if (thread == 0) {
            int32_t* counts = p.counts + head * p.stride_counts + tile * 3;
            counts[0] = fits ? found.y : EVERY_GROUP;
            counts[1] = counts[2] = 0;
        }
        __syncthreads();
        if (fits) list(found.x);
    }
};

template <int PARTS>
__global__ void __launch_bounds__(THREADS) select_kernel(const __grid_constant__ Params p) {
    extern __shared__ char raw[];
    // Neighbouring programs take the heads of one tile. Tiles with the most groups before them come first.
    const int num_heads = gridDim.x / p.num_tiles;
    Tile<PARTS>(p, *reinterpret_cast<Storage*>(raw), blockIdx.x % num_heads, p.num_tiles - 1 - blockIdx.x / num_heads)
        .run();
}

template <int PARTS>
cudaError_t launch(const Params& p, int num_heads, cudaStream_t stream) {
    constexpr int BYTES = sizeof(Storage);
    const auto kernel = select_kernel<PARTS>;
    kernel<<<num_heads * p.num_tiles, THREADS, BYTES, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace selection
