// SPDX-License-Identifier: Apache-2.0
// The producer warpgroup of the attending kernel: finds a tile's kept keys in the pages and copies them into the ring.
//
// Bands come as boxes by the bulk copy engine, own keys and columns row by row by cp.async. Where they lie is looked up
// stages ahead: list, block table and copy are a chain of three trips to L2. Slots of a stage that no listed key fills
// keep what they held, a key of an earlier stage or zero, and are masked by the consumer: no garbage enters a product.
#pragma once

#include "attend.cuh"
#include "attend_tiles.cuh"

namespace attend {

constexpr int BANDS_A_WARP = BANDS_A_STAGE / COPYING_WARPS;  // of a stage
constexpr int STAGES_LOOKED_UP = hopper::WARP / BANDS_A_WARP;
constexpr int ROWS_A_THREAD = TILE / COPYING_THREADS;

constexpr int NOWHERE = -1;

// Where a band begins, and the kind of its stage.
struct Place {
    int page, token, kind;
};

// A thread's keys of a stage, NOWHERE where it has none.
struct Keys {
    int key[ROWS_A_THREAD];
};

// Where they lie, and which halves see them in bands (bit 0: the first, bit 1: the second).
struct Rows {
    Keys keys;
    int page[ROWS_A_THREAD];
    uint32_t halves[ROWS_A_THREAD];
};

// The keys' or the values' half of the ring, and where they come from.
template <int HEAD_DIM>
struct Stream {
    using S = Shape<HEAD_DIM>;
    const Params& p;
    Storage<HEAD_DIM>& shared;
    const int which;   // KEYS or VALUES
    const int thread;  // of COPYING_THREADS
    const int warp = thread / hopper::WARP, lane = thread % hopper::WARP;
    const CUtensorMap* const map;
    const char* const source;
    int slot = 0;
    uint32_t phase = 0;  // of `empty`'s barriers

    __device__ __forceinline__ Stream(const Params& p, Storage<HEAD_DIM>& shared, int which, int thread)
        : p(p),
          shared(shared),
          which(which),
          thread(thread),
          map(which == KEYS ? &p.k_map : &p.v_map),
          source(which == KEYS ? p.k : p.v) {}

    __device__ __forceinline__ uint32_t place() const { return hopper::shared_address(shared.ring[which][slot]); }
    __device__ __forceinline__ void wait_for_place() { hopper::wait(&shared.empty[which][slot], phase ^ 1); }

    __device__ __forceinline__ void advance() {
        if (++slot == S::STAGES) {
            slot = 0;
            phase ^= 1;
        }
    }

    // Look up this warp's bands of STAGES_LOOKED_UP stages from `first` on, a lane each. Stage -1 is the tile's own keys.
    __device__ __forceinline__ Place look_up_bands(const Work& work, const BandStages& stages, int first) const {
        const int stage = first + lane / BANDS_A_WARP, in_stage = warp * BANDS_A_WARP + lane % BANDS_A_WARP;
        if (stage >= stages.total()) return {NOWHERE, 0, SHARED};
        if (stage < 0) return look_up_band(work.start_row() + in_stage * BAND, SHARED);
        const BandList list(stages, stage);
        const int entry = list.start + in_stage;
        if (entry >= list.count) return {NOWHERE, 0, list.kind};
        const bool is_shared = list.kind == SHARED || entry < stages.rest;
        const int rest = is_shared ? stages.shared * BANDS_A_STAGE + entry : entry - stages.rest;
        const int index = list.kind == SHARED ? entry : rest;
        const int64_t kind = is_shared ? 0 : list.kind * p.stride_bands_kind;
        const int offset = __ldg(p.bands + work.head * p.stride_bands + kind + index);
        return look_up_band(work.start_row() - offset * BAND, list.kind);
    }

    __device__ __forceinline__ Place look_up_band(int key, int kind) const {
        return {__ldg(p.block_table + key / p.page_size), key % p.page_size, kind};
    }

    // Bring the stage that lies `ahead` in what was looked up.
    __device__ __forceinline__ void bring_bands(const Work& work, Place looked_up, int ahead) {
        constexpr int BAND_BYTES = BAND * HEAD_DIM * 2;
        wait_for_place();
        // The ballot also keeps lanes from waiting here still when the barrier is two phases on.
        const uint32_t found = __ballot_sync(0xFFFFFFFF, looked_up.page != NOWHERE) >> (ahead * BANDS_A_WARP);
        const int num_bands = __popc(found & ((1 << BANDS_A_WARP) - 1));
        const int kind = __shfl_sync(0xFFFFFFFF, looked_up.kind, ahead * BANDS_A_WARP);
        uint64_t* barrier = &shared.full[which][slot][kind];
        if (lane == 0) hopper::arrive_expecting(barrier, num_bands * BAND_BYTES);
        if (thread == 0) hopper::arrive(barrier, FULL_ARRIVALS - COPYING_WARPS);
        if (thread == 0 && kind != SHARED) hopper::arrive(&shared.empty[which][slot], WARPS_A_HALF);
        const uint32_t target = place() + warp * BANDS_A_WARP * BAND * hopper::SWIZZLE_BYTES;
#pragma unroll
        for (int band = 0; band < BANDS_A_WARP; ++band) {
            const int from = ahead * BANDS_A_WARP + band;
            const int page = __shfl_sync(0xFFFFFFFF, looked_up.page, from);
            const int token = __shfl_sync(0xFFFFFFFF, looked_up.token, from);
            if (lane != 0 || band >= num_bands) continue;
#pragma unroll
            for (int block = 0; block < S::BLOCKS; ++block) {
                const uint32_t box = target + block * S::KEY_BLOCK_BYTES + band * BAND * hopper::SWIZZLE_BYTES;
                hopper::copy_box(box, map, barrier, block * hopper::BOX_ELEMENTS, token, work.kv_head, page);
            }
        }
        advance();
    }

    __device__ __forceinline__ Rows look_up(const Work& work, const Keys& keys, bool in_columns) const {
        Rows rows;
        rows.keys = keys;
#pragma unroll
        for (int part = 0; part < ROWS_A_THREAD; ++part) {
            const int key = keys.key[part];
            rows.page[part] = 0;
            rows.halves[part] = 0;
            if (key == NOWHERE) continue;
            rows.page[part] = __ldg(p.block_table + key / p.page_size);
            const int offset = work.tile * BANDS_A_TILE - key / BAND;
            if (in_columns) rows.halves[part] = __ldg(p.band_halves + work.head * p.stride_halves + offset);
        }
        return rows;
    }

    __device__ __forceinline__ Keys own_keys(const Work& work) const {
        const int last_key = p.context_len + p.num_rows - 1;
        const int first = work.start_row() + thread;
        return {min(first, last_key), min(first + COPYING_THREADS, last_key)};
    }

    __device__ __forceinline__ Keys columns(const Work& work, int start) const {
        Keys keys;
#pragma unroll
        for (int part = 0; part < ROWS_A_THREAD; ++part) {
            const int entry = start + thread + part * COPYING_THREADS;
            keys.key[part] = NOWHERE;
            if (entry < work.num_columns) keys.key[part] = __ldg(p.columns + work.head * p.stride_columns + entry);
        }
        return keys;
    }

    // Copy this warp's rows of a stage, those that its lanes have looked up. Returns which each half takes: bit
    // 2 * part + half.
    __device__ __forceinline__ uint32_t bring_rows(const Work& work, const Rows& rows) {
        constexpr int CHUNKS = HEAD_DIM / 8;  // of 16 bytes a row
        constexpr int ROWS_AT_ONCE = hopper::WARP / CHUNKS;
        // From atom to atom a lane's targets lie alike.
        constexpr int TIMES_AN_ATOM = 8 / ROWS_AT_ONCE;
        const int chunk = lane % CHUNKS, in_rows = lane / CHUNKS;
        const int swizzled = (chunk % 8) ^ in_rows;
        uint32_t taken = 0;
        wait_for_place();
#pragma unroll
        for (int part = 0; part < ROWS_A_THREAD; ++part) {
            const int lane_row = part * COPYING_THREADS + warp * hopper::WARP + in_rows;
            uint32_t atom = place() + chunk / 8 * S::KEY_BLOCK_BYTES + lane_row * hopper::SWIZZLE_BYTES;
            const int key = rows.keys.key[part];
            const int64_t in_cache = rows.page[part] * p.stride_page + key % p.page_size * p.stride_token;
            const int64_t lies_at = key == NOWHERE ? NOWHERE : in_cache + work.kv_head * p.stride_kv_head;
            if (key != NOWHERE) taken |= (rows.halves[part] ^ 3) << (2 * part);
#pragma unroll 1
            for (int eight = 0; eight < hopper::WARP; eight += 8, atom += hopper::ATOM_BYTES) {
#pragma unroll
                for (int i = 0; i < TIMES_AN_ATOM; ++i) {
                    const int row = i * ROWS_AT_ONCE;  // of the eight
                    const int64_t row_lies_at = __shfl_sync(0xFFFFFFFF, lies_at, eight + row + in_rows);
                    const uint32_t target = atom + row * hopper::SWIZZLE_BYTES + (swizzled ^ row) * 16;
                    if (row_lies_at >= 0) hopper::copy_16_bytes(target, source + row_lies_at + chunk * 16);
                }
            }
        }
        hopper::arrive_after_copies(&shared.full[which][slot][SHARED]);
        if (which == KEYS) write_mask(shared.fresh[slot], taken);
        if (lane == 0) hopper::arrive(&shared.full[which][slot][SHARED]);
        advance();
        return taken;
    }

    __device__ __forceinline__ void write_mask(int32_t (*fresh)[TILE / 32], uint32_t taken) const {
#pragma unroll
        for (int part = 0; part < ROWS_A_THREAD; ++part) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t bits = __ballot_sync(0xFFFFFFFF, taken >> (2 * part + half) & 1);
                if (lane == 0) fresh[half][part * COPYING_WARPS + warp] = bits;
            }
        }
    }
};

// What is looked up before a tile begins.
struct Ahead {
    Place bands;
    Rows columns;
    Keys more_columns;
};

template <int HEAD_DIM>
__device__ __forceinline__ Ahead look_ahead(const Stream<HEAD_DIM>& stream, const Work& work) {
    Ahead ahead;
    const Keys columns = stream.columns(work, 0);
    ahead.bands = stream.look_up_bands(work, BandStages(work), work.is_cut_short(stream.p) ? 0 : -1);
    ahead.columns = stream.look_up(work, columns, true);
    ahead.more_columns = stream.columns(work, TILE);
    return ahead;
}

// Bring a tile's first stage, its own keys, and its queries.
template <int HEAD_DIM>
__device__ __forceinline__ void begin_tile(
    Stream<HEAD_DIM>& stream, const Work& work, const Ahead& ahead, bool is_over, uint32_t q_phase
) {
    if (work.is_cut_short(stream.p)) {
        stream.bring_rows(work, stream.look_up(work, stream.own_keys(work), false));
    } else {
        stream.bring_bands(work, ahead.bands, 0);
    }
    if (stream.which == KEYS && stream.thread == 0) bring_queries(stream.p, stream.shared, work, is_over, q_phase);
    __syncwarp();
}

// Bring a tile's bands, in the stages that the consumers expect.
template <int HEAD_DIM>
__device__ __forceinline__ void produce_bands(Stream<HEAD_DIM>& stream, const Work& work, Place bands) {
    const BandStages stages(work);
    int base = work.is_cut_short(stream.p) ? 0 : -1;  // the first stage looked up
    Place next_bands = stream.look_up_bands(work, stages, base + STAGES_LOOKED_UP);
#pragma unroll 1
    for (int stage = 0; stage < stages.total(); ++stage) {
        if (stage == base + STAGES_LOOKED_UP) {
            base = stage;
            bands = next_bands;
            next_bands = stream.look_up_bands(work, stages, base + STAGES_LOOKED_UP);
        }
        stream.bring_bands(work, bands, stage - base);
    }
}

// Bring a tile's columns. Returns the tile's pairs that this thread has counted.
template <int HEAD_DIM>
__device__ __forceinline__ long long produce_columns(
    Stream<HEAD_DIM>& stream, const Work& work, Rows next_rows, Keys next_columns
) {
    int taken[2] = {0, 0};
#pragma unroll 1
    for (int start = 0; start < work.num_columns; start += TILE) {
        const Rows rows = next_rows;
        next_rows = stream.look_up(work, next_columns, true);
        next_columns = stream.columns(work, start + 2 * TILE);
        const uint32_t bits = stream.bring_rows(work, rows);
        taken[0] += __popc(bits & 0b0101);
        taken[1] += __popc(bits & 0b1010);
    }
    return count_pairs(stream.p, work, taken, stream.thread == 0);
}

template <int HEAD_DIM>
__device__ __forceinline__ void produce(const Params& p, Storage<HEAD_DIM>& shared, int which, int thread) {
    Stream<HEAD_DIM> stream(p, shared, which, thread);
    const Order order(p);
    long long pairs = 0;
    const int last = order.size(p) - 1;
    int id = blockIdx.x;
    Work work = order.at(p, min(id, last));
    Ahead ahead = look_ahead(stream, work);
#pragma unroll 1
    for (int turn = 0;; ++turn) {
        // The consumers end a tile over the beginning of the next, the last one too.
        const bool is_over = id > last;
        if (which == KEYS || !is_over) begin_tile(stream, work, ahead, is_over, turn & 1);
        if (is_over) break;
        if (which == KEYS && thread == 0) draw(p, shared, last, turn);
        __syncwarp();
        produce_bands(stream, work, ahead.bands);
        id = drawn(shared, turn, stream.lane);
        const Work next = order.at(p, min(id, last));
        if (which == KEYS) prefetch_queries<HEAD_DIM>(p, next, thread);
        const Rows columns = ahead.columns;
        const Keys more_columns = ahead.more_columns;
        ahead = look_ahead(stream, next);
        pairs += produce_columns(stream, work, columns, more_columns);
        work = next;
    }
    if (which == KEYS && pairs) atomicAdd(p.kept_pairs, (unsigned long long)pairs);
}

}  // namespace attend
