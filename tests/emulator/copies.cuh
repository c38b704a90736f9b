// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies into shared memory: rows by cp.async, boxes by the bulk copy engine. They land some turns later;
// until then their target is NaN.
#pragma once

#include "warps.cuh"

constexpr int MAX_RANK = 4;

struct CUtensorMap {
    const char* base;
    int rank;
    int element_bytes;
    int64_t sizes[MAX_RANK], strides[MAX_RANK], box[MAX_RANK];  // elements

    // The byte after its last element.
    const char* end() const {
        int64_t last = 0;
        for (int i = 0; i < rank; ++i) last += (sizes[i] - 1) * strides[i];
        return base + element_bytes * (last + 1);
    }
};

namespace emulator {

// Tensors that this launch has described. cp.async must read from one of them.
inline std::vector<CUtensorMap> described;
// For each thread the turn in which the last of its copies lands.
inline std::vector<uint64_t> last_landing;

inline bool is_described(const char* piece) {
    return std::any_of(described.begin(), described.end(), [=](const CUtensorMap& tensor) {
        return piece >= tensor.base && piece + PIECE <= tensor.end();
    });
}

inline void copy_piece(uint32_t target, const char* source) {
    EMULATOR_CHECK(target % PIECE == 0, "cp.async to %u, which is not aligned", target);
    EMULATOR_CHECK(is_described(source), "cp.async from outside the cache");
    fill_with_nan(target);
    const uint64_t turn = now + draw_latency();
    uint64_t& last = last_landing[threadIdx.x];
    last = max(last, turn);
    at_turn(turn, [=] {
        memcpy(locate(target), source, PIECE);
        writing_turn(target) = now;
    });
}

inline void arrive_after_copies(int barrier) {
    const uint64_t turn = max(last_landing[threadIdx.x], now) + 1 + draw(20);
    at_turn(turn, [=] { arrive(barrier, 1); });
}

struct Box {
    CUtensorMap map;
    uint32_t target;
    int64_t corner[MAX_RANK];

    int row_bytes() const { return map.box[0] * map.element_bytes; }

    int num_rows() const {
        int rows = 1;
        for (int i = 1; i < map.rank; ++i) rows *= map.box[i];
        return rows;
    }

    uint32_t piece(int row, int i) const { return swizzle(target + row * row_bytes() + i * PIECE, row_bytes()); }

    // Where a row of the box lies in global memory; null outside the tensor.
    const char* source_row(int row) const {
        int64_t offset = corner[0];
        bool is_inside = corner[0] >= 0 && corner[0] + map.box[0] <= map.sizes[0];
        for (int i = 1; i < map.rank; ++i) {
            const int64_t x = corner[i] + row % map.box[i];
            row /= map.box[i];
            is_inside &= x >= 0 && x < map.sizes[i];
            offset += x * map.strides[i];
        }
        return is_inside ? map.base + map.element_bytes * offset : nullptr;
    }

    void land() const {
        for (int row = 0; row < num_rows(); ++row) {
            const char* source = source_row(row);
            for (int i = 0; i < row_bytes() / PIECE; ++i) {
                char* place = locate(piece(row, i));
                writing_turn(piece(row, i)) = 0;
                if (source != nullptr) {
                    memcpy(place, source + i * PIECE, PIECE);
                } else {
                    memset(place, 0, PIECE);
                }
            }
        }
    }
};

template <int RANK>
void copy_box(uint32_t target, const CUtensorMap* map, int barrier, const int (&corner)[RANK]) {
    EMULATOR_CHECK(map->rank == RANK && target % 128 == 0, "box to %u", target);
    Box box{*map, target};
    std::copy(corner, corner + RANK, box.corner);
    for (int row = 0; row < box.num_rows(); ++row) {
        // Queries (rank 3) past the chunk come as zeros. Keys must never be read from outside the cache.
        EMULATOR_CHECK(RANK == 3 || box.source_row(row) != nullptr, "box outside the cache");
        for (int i = 0; i < box.row_bytes() / PIECE; ++i) fill_with_nan(box.piece(row, i));
    }
    at_turn(now + draw_latency(), [=] {
        box.land();
        barriers[barrier].bytes -= box.num_rows() * box.row_bytes();
        end_phase_if_complete(barrier);
    });
}

}  // namespace emulator
