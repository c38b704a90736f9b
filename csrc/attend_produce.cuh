// SPDX-License-Identifier: Apache-2.0
// The producer warpgroup of the attention kernel: finds a tile's keys in the pages and copies them into the ring.
//
// Groups are copied as boxes by the bulk copy engine (TMA), columns row by row with cp.async. Their places are looked
// up stages ahead, because list, block table and copy are three round trips to L2, each of which needs the one before.
// Rows of a slot that a stage does not fill keep what they held: a key or value of an earlier stage, or zero. The
// consumers mask them, and since they are finite, a probability of zero makes them harmless.
#pragma once

#include "attend.cuh"
#include "attend_schedule.cuh"

namespace attend {

constexpr int NOWHERE = -1;

// Where a group begins, and the kind of its stage.
struct Place {
    int page, token, kind;
};

// The keys' or the values' half of the ring, and where they come from.
template <typename Stored, int HEAD_DIM, typename Index>
struct Stream {
    using S = Shape<Stored, HEAD_DIM>;
    static constexpr bool HAS_COLUMNS = Index::HAS_COLUMNS;
    static constexpr int COPYING_THREADS = S::COPYING_THREADS, COPYING_WARPS = S::COPYING_WARPS;
    static constexpr int GROUPS_PER_WARP = GROUPS_PER_STAGE / COPYING_WARPS;  // of a stage
    static constexpr int STAGES_LOOKED_UP = hopper::WARP / GROUPS_PER_WARP;
    static constexpr int ROWS_PER_THREAD = TILE / COPYING_THREADS;

    // The keys that a thread copies for a stage, NOWHERE in place of those that it does not have.
    struct Keys {
        int key[ROWS_PER_THREAD];
    };

    // Where these keys are, and which halves already have them in groups; bit h is set for half h.
    struct Rows {
        Keys keys;
        int page[ROWS_PER_THREAD];
        uint32_t halves[ROWS_PER_THREAD];
    };

    // What is looked up before a tile begins.
    struct Ahead {
        Place groups;
        Rows columns;
        Keys more_columns;
    };

    const Params& p;
    const Index& index;
    Storage<Stored, HEAD_DIM>& shared;
    const int which;   // KEYS or VALUES
    const int thread;  // of COPYING_THREADS
    const int warp = thread / hopper::WARP, lane = thread % hopper::WARP;
    const CUtensorMap* const map;
    const char* const source;
    int slot = 0;
    uint32_t phase = 0;  // of the barriers in `empty`

    __device__ __forceinline__ Stream(
        const Params& p, const Index& index, Storage<Stored, HEAD_DIM>& shared, int which, int thread
    )
        : p(p),
          index(index),
          shared(shared),
          which(which),
          thread(thread),
          map(which == KEYS ? &p.k_map : &p.v_map),
          source(which == KEYS ? p.k : p.v) {}

    __device__ __forceinline__ uint32_t address() const { return hopper::shared_address(shared.ring[which][slot]); }
    __device__ __forceinline__ void wait_for_slot() { hopper::wait(&shared.empty[which][slot], phase ^ 1); }

    __device__ __forceinline__ void advance() {
        if (++slot == S::STAGES) {
            slot = 0;
            phase ^= 1;
        }
    }

    // Tell the threads that convert values of which kind the next stage is.
    __device__ __forceinline__ void note_kind(int kind) {
        if constexpr (S::CONVERTS) {
            if (which == VALUES && thread == 0) shared.kinds[slot] = kind;
        }
    }

    // Tell the threads that convert values that no stage follows.
    __device__ __forceinline__ void end() {
        wait_for_slot();
        __syncwarp();
        note_kind(NO_MORE);
        if (thread == 0) hopper::arrive(&shared.full[which][slot][SHARED], S::FULL_ARRIVALS);
    }

    // Look up this warp's groups of STAGES_LOOKED_UP stages from `first` on, one per lane. Stage -1 is the tile's own
    // keys.
    __device__ __forceinline__ Place look_up_groups(const Work& work, const Stages& stages, int first) const {
        const int stage = first + lane / GROUPS_PER_WARP, in_stage = warp * GROUPS_PER_WARP + lane % GROUPS_PER_WARP;
        if (stage >= stages.total()) return {NOWHERE, 0, SHARED};
        if (stage < 0) return look_up_group(work.start_row() + in_stage * GROUP, SHARED);
        const StageGroups list(stages, stage);
        // A half's private stages begin with the shared groups that fill no shared stage.
        const int entry = list.start + in_stage;
        if (entry >= list.count) return {NOWHERE, 0, list.kind};
        const bool is_shared = list.kind == SHARED || entry < stages.rest;
        const int rest = is_shared ? stages.shared * GROUPS_PER_STAGE + entry : entry - stages.rest;
        const int i = list.kind == SHARED ? entry : rest;
        return look_up_group(index.group_key(work, is_shared ? SHARED : list.kind, i), list.kind);
    }

    __device__ __forceinline__ Place look_up_group(int key, int kind) const {
        return {__ldg(p.block_table + key / p.page_size), key % p.page_size, kind};
    }

    // Copy this warp's groups of the stage that comes `ahead` stages after the first one looked up.
    __device__ __forceinline__ void load_groups(const Work& work, Place looked_up, int ahead) {
        constexpr int GROUP_BYTES = GROUP * S::ROW_BYTES;
        wait_for_slot();
        // The ballot also holds lane 0 back until all lanes have seen this phase of the barrier. Lane 0 could otherwise
        // get two phases ahead, where the parity is the same, and a lane that still waits would wait for ever.
        const uint32_t found = __ballot_sync(0xFFFFFFFF, looked_up.page != NOWHERE) >> (ahead * GROUPS_PER_WARP);
        const int num_groups = __popc(found & ((1 << GROUPS_PER_WARP) - 1));
        const int kind = __shfl_sync(0xFFFFFFFF, looked_up.kind, ahead * GROUPS_PER_WARP);
        note_kind(kind);
        // The threads that convert values skip no stage: see Storage::full.
        const int taken_by = S::CONVERTS && which == VALUES ? SHARED : kind;
        uint64_t* barrier = &shared.full[which][slot][taken_by];
        if (lane == 0) hopper::arrive_expecting(barrier, num_groups * GROUP_BYTES);
        if (thread == 0) hopper::arrive(barrier, S::FULL_ARRIVALS - COPYING_WARPS);
        // A half skips this stage and will not empty its slot.
        if (thread == 0 && taken_by != SHARED) hopper::arrive(&shared.empty[which][slot], WARPS_PER_HALF);
        const uint32_t target = address() + warp * GROUPS_PER_WARP * GROUP * S::SWIZZLE_BYTES;
#pragma unroll
        for (int group = 0; group < GROUPS_PER_WARP; ++group) {
            const int from = ahead * GROUPS_PER_WARP + group;
            const int page = __shfl_sync(0xFFFFFFFF, looked_up.page, from);
            const int token = __shfl_sync(0xFFFFFFFF, looked_up.token, from);
            if (lane != 0 || group >= num_groups) continue;
#pragma unroll
            for (int block = 0; block < S::BLOCKS; ++block) {
                const uint32_t box = target + block * S::KEY_BLOCK_BYTES + group * GROUP * S::SWIZZLE_BYTES;
                hopper::copy_box(box, map, barrier, block * S::BOX_ELEMENTS, token, work.kv_head, page);
            }
        }
        advance();
    }

    template <bool ARE_COLUMNS>
    __device__ __forceinline__ Rows look_up_rows(const Work& work, const Keys& keys) const {
        Rows rows;
        rows.keys = keys;
#pragma unroll
        for (int part = 0; part < ROWS_PER_THREAD; ++part) {
            const int key = keys.key[part];
            rows.page[part] = 0;
            rows.halves[part] = 0;
            if (key == NOWHERE) continue;
            rows.page[part] = __ldg(p.block_table + key / p.page_size);
            if constexpr (ARE_COLUMNS) rows.halves[part] = index.halves_with(work, key);
        }
        return rows;
    }

    __device__ __forceinline__ Keys own_keys(const Work& work) const {
        const int last_key = p.context_len + p.num_rows - 1;
        Keys keys;
#pragma unroll
        for (int part = 0; part < ROWS_PER_THREAD; ++part) {
            keys.key[part] = min(work.start_row() + thread + part * COPYING_THREADS, last_key);
        }
        return keys;
    }

    __device__ __forceinline__ Keys columns(const Work& work, int start) const {
        Keys keys;
#pragma unroll
        for (int part = 0; part < ROWS_PER_THREAD; ++part) {
            const int entry = start + thread + part * COPYING_THREADS;
            keys.key[part] = NOWHERE;
            if (entry < work.num_columns) keys.key[part] = index.column(work, entry);
        }
        return keys;
    }

    // Copy the rows of a stage that this warp's lanes have looked up. Bit 2 * part + half of the result says whether
    // this thread's row of that part is new to that half.
    __device__ __forceinline__ uint32_t load_rows(const Work& work, const Rows& rows) {
        constexpr int CHUNKS = S::ROW_BYTES / 16, CHUNKS_PER_BLOCK = S::SWIZZLE_BYTES / 16;
        constexpr int ROWS_AT_ONCE = hopper::WARP / CHUNKS;
        // A lane's targets lie at the same offsets in every atom of eight rows.
        constexpr int TIMES_PER_ATOM = 8 / ROWS_AT_ONCE;
        // Swizzling XORs a chunk's number with one that changes every 128 bytes, so rows of 64 bytes share it in pairs.
        constexpr int ROWS_ALIKE = hopper::SWIZZLE_BYTES / S::SWIZZLE_BYTES;
        const int chunk = lane % CHUNKS, in_rows = lane / CHUNKS;
        const int swizzled = (chunk % CHUNKS_PER_BLOCK) ^ (in_rows / ROWS_ALIKE);
        uint32_t fresh = 0;
        wait_for_slot();
        note_kind(SHARED);
#pragma unroll
        for (int part = 0; part < ROWS_PER_THREAD; ++part) {
            const int lane_row = part * COPYING_THREADS + warp * hopper::WARP + in_rows;
            uint32_t atom = address() + chunk / CHUNKS_PER_BLOCK * S::KEY_BLOCK_BYTES + lane_row * S::SWIZZLE_BYTES;
            const int key = rows.keys.key[part];
            const int64_t in_cache = rows.page[part] * p.stride_page + key % p.page_size * p.stride_token;
            const int64_t offset = key == NOWHERE ? NOWHERE : in_cache + work.kv_head * p.stride_kv_head;
            if (key != NOWHERE) fresh |= (rows.halves[part] ^ 3) << (2 * part);
#pragma unroll 1
            for (int eight = 0; eight < hopper::WARP; eight += 8, atom += 8 * S::SWIZZLE_BYTES) {
#pragma unroll
                for (int i = 0; i < TIMES_PER_ATOM; ++i) {
                    // CHUNKS lanes copy a row together; the lane that has looked it up tells them where it is.
                    const int row = i * ROWS_AT_ONCE;  // of the eight
                    const int64_t row_offset = __shfl_sync(0xFFFFFFFF, offset, eight + row + in_rows);
                    const uint32_t target = atom + row * S::SWIZZLE_BYTES + (swizzled ^ row / ROWS_ALIKE) * 16;
                    if (row_offset >= 0) hopper::copy_16_bytes(target, source + row_offset + chunk * 16);
                }
            }
        }
        hopper::arrive_after_copies(&shared.full[which][slot][SHARED]);
        if (which == KEYS) write_mask(shared.fresh[slot], fresh);
        if (lane == 0) hopper::arrive(&shared.full[which][slot][SHARED]);
        advance();
        return fresh;
    }

    __device__ __forceinline__ void write_mask(int32_t (*mask)[TILE / 32], uint32_t fresh) const {
#pragma unroll
        for (int part = 0; part < ROWS_PER_THREAD; ++part) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint32_t bits = __ballot_sync(0xFFFFFFFF, fresh >> (2 * part + half) & 1);
                if (lane == 0) mask[half][part * COPYING_WARPS + warp] = bits;
            }
        }
    }
};

template <typename ThisStream>
__device__ __forceinline__ auto look_ahead(const ThisStream& stream, const Work& work) {
    typename ThisStream::Ahead ahead;
    typename ThisStream::Keys columns;
    if constexpr (ThisStream::HAS_COLUMNS) columns = stream.columns(work, 0);
    const Stages stages(work, ThisStream::HAS_COLUMNS);
    ahead.groups = stream.look_up_groups(work, stages, work.is_cut_short(stream.p) ? 0 : -1);
    if constexpr (ThisStream::HAS_COLUMNS) {
        ahead.columns = stream.template look_up_rows<true>(work, columns);
        ahead.more_columns = stream.columns(work, TILE);
    }
    return ahead;
}

// Load a tile's first stage, its own keys, and its queries.
template <typename ThisStream>
__device__ __forceinline__ void begin_tile(
    ThisStream& stream, const Work& work, const typename ThisStream::Ahead& ahead, bool is_over, uint32_t q_phase
) {
    if (work.is_cut_short(stream.p)) {
        stream.load_rows(work, stream.template look_up_rows<false>(work, stream.own_keys(work)));
    } else {
        stream.load_groups(work, ahead.groups, 0);
    }
    if (stream.which == KEYS && stream.thread == 0) load_queries(stream.p, stream.shared, work, is_over, q_phase);
    __syncwarp();
}

template <typename ThisStream>
__device__ __forceinline__ void produce_groups(ThisStream& stream, const Work& work, Place groups) {
    constexpr int STAGES_LOOKED_UP = ThisStream::STAGES_LOOKED_UP;
    const Stages stages(work, ThisStream::HAS_COLUMNS);
    int base = work.is_cut_short(stream.p) ? 0 : -1;  // the first stage looked up
    Place next_groups = stream.look_up_groups(work, stages, base + STAGES_LOOKED_UP);
#pragma unroll 1
    for (int stage = 0; stage < stages.total(); ++stage) {
        if (stage == base + STAGES_LOOKED_UP) {
            base = stage;
            groups = next_groups;
            next_groups = stream.look_up_groups(work, stages, base + STAGES_LOOKED_UP);
        }
        stream.load_groups(work, groups, stage - base);
    }
}

//   fresh: receives how many columns this thread has copied for each half.
template <typename ThisStream>
__device__ __forceinline__ void produce_columns(
    ThisStream& stream, const Work& work, typename ThisStream::Rows next_rows, typename ThisStream::Keys next_columns,
    int (&fresh)[2]
) {
    constexpr uint32_t FIRST_HALF = ((1 << 2 * ThisStream::ROWS_PER_THREAD) - 1) / 3;  // 0b..0101: bits of half 0
#pragma unroll 1
    for (int start = 0; start < work.num_columns; start += TILE) {
        const auto rows = next_rows;
        next_rows = stream.template look_up_rows<true>(work, next_columns);
        next_columns = stream.columns(work, start + 2 * TILE);
        const uint32_t bits = stream.load_rows(work, rows);
        fresh[0] += __popc(bits & FIRST_HALF);
        fresh[1] += __popc(bits & FIRST_HALF << 1);
    }
}

template <typename Stored, int HEAD_DIM, typename Index>
__device__ __forceinline__ void produce(
    const Params& p, const Index& index, Storage<Stored, HEAD_DIM>& shared, int which, int thread
) {
    using S = Shape<Stored, HEAD_DIM>;
    Stream<Stored, HEAD_DIM, Index> stream(p, index, shared, which, thread);
    const Order order(p, index);
    long long pairs = 0;
    const int last = order.size() - 1;
    int id = blockIdx.x;
    Work work = order.at(p, index, min(id, last));
    auto ahead = look_ahead(stream, work);
#pragma unroll 1
    for (int turn = 0;; ++turn) {
        // The consumers start the first scores of the next tile before they finish this one. So one more tile must
        // follow the last, of which only keys and queries are loaded.
        const bool is_over = id > last;
        if (which == KEYS || !is_over) begin_tile(stream, work, ahead, is_over, turn & 1);
        if (is_over) break;
        if (which == KEYS && thread == 0) draw_tile(p, shared, last, turn);
        __syncwarp();
        produce_groups(stream, work, ahead.groups);
        id = drawn_tile(shared, turn, stream.lane);
        const Work next = order.at(p, index, min(id, last));
        if (which == KEYS) prefetch_queries<S>(p, next, thread);
        const auto now = ahead;
        ahead = look_ahead(stream, next);
        int fresh[2] = {0, 0};
        if constexpr (Index::HAS_COLUMNS) produce_columns(stream, work, now.columns, now.more_columns, fresh);
        pairs += count_pairs(p, work, fresh, thread == 0);
        work = next;
    }
    if (S::CONVERTS && which == VALUES) stream.end();
    if (which == KEYS && pairs) atomicAdd(p.kept_pairs, (unsigned long long)pairs);
}

}  // namespace attend
