// SPDX-License-Identifier: Apache-2.0
// How keys and queries come into the probe's shared memory.
#pragma once

#include "probe.cuh"

namespace probe {

// Set up barriers, before producer and consumers go different ways.
template <int ROW_BYTES>
__device__ __forceinline__ void set_up(const Params& p, const Shared<ROW_BYTES>& shared, const Job& job) {
    if (threadIdx.x == 0) {
        hopper::prefetch_map(&p.k_map);
        for (int i = 0; i < p.stages; ++i) {
            hopper::init_barrier(&shared.barriers->full[i], 1);
            // Each warp of the warpgroups that have a head arrives.
            hopper::init_barrier(&shared.barriers->empty[i], min(job.num_heads, CONSUMERS) * 4);
        }
        hopper::fence_barrier_init();
    }
    __syncthreads();
}

// Where a band is in the cache.
struct Place {
    int page, first;

    __device__ __forceinline__ Place(const Params& p, int band) {
        // Past the end the block table holds garbage. The last band is read instead; no row sees the keys of that
        // place.
        const int key = min(band, (p.seq_len() - 1) / BAND) * BAND;
        page = __ldg(p.block_table + key / p.page_size);
        first = key % p.page_size;
    }
};

// Run by one warp: lane l copies box l of each tile, 128 bytes of each key of a band. The second pass goes BACKWARDS,
// because the keys that the first pass has read last are still in L2.
template <int ROW_BYTES, bool BACKWARDS>
__device__ __forceinline__ void produce(const Params& p, const Shared<ROW_BYTES>& shared, const Job& job) {
    using S = Shape<ROW_BYTES>;
    const int lane = threadIdx.x % hopper::WARP;
    const bool copies = lane < BANDS * S::BLOCKS;
    const int band = lane / S::BLOCKS % BANDS, block = lane % S::BLOCKS;
    const auto place = [&](int i) {
        const int tile = job.first_tile + (BACKWARDS ? job.num_tiles - 1 - i : i);
        return Place(p, tile * BANDS + band);
    };
    const uint32_t box =
        hopper::shared_address(shared.keys) + block * S::KEY_BLOCK_BYTES + band * BAND * hopper::SWIZZLE_BYTES;
    Ring ring;
    Place next = place(0);
    for (int i = 0; i < job.num_tiles; ++i) {
        const Place here = next;
        // Look up the next tile now, so that its copy need not wait for the block table.
        if (i + 1 < job.num_tiles) next = place(i + 1);
        uint64_t* full = &shared.barriers->full[ring.slot];
        hopper::wait(&shared.barriers->empty[ring.slot], ring.phase ^ 1);
        if (lane == 0) hopper::arrive_expecting(full, S::KEY_BYTES);
        __syncwarp();
        if (copies) {
            hopper::copy_box(
                box + ring.slot * S::KEY_BYTES, &p.k_map, full, block * hopper::BOX_ELEMENTS, here.first,
                job.kv_head, here.page
            );
        }
        ring.advance(p.stages);
    }
}

// Run by all consumers: load the probe rows of every head, swizzled as the tensor cores read them. Rows that the chunk
// does not have are zeros.
template <int ROW_BYTES>
__device__ __forceinline__ void load_queries(const Params& p, const Shared<ROW_BYTES>& shared, const Job& job) {
    using S = Shape<ROW_BYTES>;
    constexpr int CHUNKS_PER_BLOCK = hopper::SWIZZLE_BYTES / 16;
    constexpr int CHUNKS = S::BLOCKS * CHUNKS_PER_BLOCK;
    const Rows rows(p);
    for (int i = threadIdx.x; i < job.num_heads * NUM_PROBES * CHUNKS; i += CONSUMER_THREADS) {
        const int chunk = i % CHUNKS, place = i / CHUNKS % NUM_PROBES, head = i / CHUNKS / NUM_PROBES;
        const int row = rows.row(probe_at(place));
        int4 elements = make_int4(0, 0, 0, 0);
        if (row >= 0) {
            const char* source = p.q + row * p.stride_q_row + (job.first_head + head) * p.stride_q_head + chunk * 16;
            elements = __ldg(reinterpret_cast<const int4*>(source));
        }
        char* block = shared.queries + head * S::QUERY_BYTES + chunk / CHUNKS_PER_BLOCK * S::QUERY_BLOCK_BYTES;
        const int swizzled = (chunk ^ place) % CHUNKS_PER_BLOCK;
        *reinterpret_cast<int4*>(block + place * hopper::SWIZZLE_BYTES + swizzled * 16) = elements;
    }
    hopper::fence_async_proxy();
}

// Only two of the four warpgroups may use the tensor cores at a time, while the others compute exponentials. Without
// turns all four would first wait for the tensor cores and then leave them idle. Used only if all have equally many
// heads.
struct Turns {
    bool taken, begins;
    int own, next;

    __device__ __forceinline__ Turns(int num_heads, int warpgroup)
        : taken(num_heads % CONSUMERS == 0),
          begins(warpgroup < CONSUMERS / 2),
          own(FIRST_TURN + warpgroup),
          next(FIRST_TURN + (warpgroup + CONSUMERS / 2) % CONSUMERS) {
        // Those that do not begin give the first turns to those that do.
        if (!begins) pass();
    }
    __device__ __forceinline__ void wait() const {
        if (taken) hopper::wait_named(own, 2 * hopper::WARPGROUP);
    }
    __device__ __forceinline__ void pass() const {
        if (taken) hopper::arrive_named(next, 2 * hopper::WARPGROUP);
    }
    // Take the turn that was passed last, so that no barrier is left half full.
    __device__ __forceinline__ void finish() const {
        if (begins) wait();
    }
};

// One program of a pass: the last warpgroup produces, the others consume.
template <int ROW_BYTES, bool BACKWARDS, typename Consume>
__device__ __forceinline__ void run_program(const Params& p, char* raw, Consume consume) {
    const Shared<ROW_BYTES> shared(raw, p);
    const Job job(p);
    set_up(p, shared, job);
    // The broadcast from lane 0 tells the compiler that all lanes of a warp take the same branch.
    const int warpgroup = __shfl_sync(0xFFFFFFFF, int(threadIdx.x) / hopper::WARPGROUP, 0);
    if (warpgroup == CONSUMERS) {
        hopper::fewer_registers<PRODUCER_REGISTERS>();
        if (threadIdx.x < CONSUMER_THREADS + hopper::WARP) produce<ROW_BYTES, BACKWARDS>(p, shared, job);
    } else {
        hopper::more_registers<CONSUMER_REGISTERS>();
        consume(p, shared, job, warpgroup);
    }
}

}  // namespace probe
