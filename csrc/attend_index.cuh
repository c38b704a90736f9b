// SPDX-License-Identifier: Apache-2.0
// The types of minference_vllm/index.py, as the attention kernel reads them: which heads it computes, how many groups
// and columns a tile keeps, and where they are.
#pragma once

#include "attend.cuh"

namespace attend {

// Bands and single columns. A band is a group at a distance from the tile that is the same for every tile of a head.
struct BandIndex {
    static constexpr bool HAS_COLUMNS = true, LISTS_HEADS = false;
    static constexpr int long_tiles = 0;

    const int32_t* bands;
    const int32_t* bands_indptr;
    const uint8_t* band_halves;
    const int32_t* columns;
    const int32_t* columns_indptr;
    int64_t stride_bands, stride_bands_kind, stride_bands_indptr, stride_bands_indptr_kind, stride_band_halves,
        stride_columns, stride_columns_indptr;

    __device__ __forceinline__ void count(Work& work) const {
        const int32_t* indptr = bands_indptr + work.head * stride_bands_indptr + work.tile;
#pragma unroll
        for (int kind = 0; kind < KINDS; ++kind) {
            work.num_groups[kind] = __ldg(indptr + kind * stride_bands_indptr_kind);
        }
        work.num_columns = __ldg(columns_indptr + work.head * stride_columns_indptr + work.tile);
    }

    // The first key of the i-th group of a kind.
    __device__ __forceinline__ int group_key(const Work& work, int kind, int i) const {
        const int offset = __ldg(bands + work.head * stride_bands + kind * stride_bands_kind + i);
        return work.start_row() - offset * GROUP;
    }

    __device__ __forceinline__ int column(const Work& work, int i) const {
        return __ldg(columns + work.head * stride_columns + i);
    }

    // Which halves keep a key in a band; bit h is set for half h.
    __device__ __forceinline__ uint32_t halves_with(const Work& work, int key) const {
        const int offset = work.tile * GROUPS_PER_TILE - key / GROUP;
        return __ldg(band_halves + work.head * stride_band_halves + offset);
    }
};

// Groups listed for each tile, no columns.
struct TileIndex {
    static constexpr bool HAS_COLUMNS = false, LISTS_HEADS = false;
    static constexpr int EVERY_GROUP = -1;  // in place of the first count: the tile keeps all groups before it

    const int32_t* groups;
    const int32_t* counts;
    int64_t stride_groups, stride_groups_tile, stride_counts, stride_counts_tile;
    int32_t first_tile;  // of the chunk: lists are numbered from there
    // At the chunk's end: the last rows of a prompt may keep all keys, ten times as many as others.
    int32_t long_tiles;

    __device__ __forceinline__ void count(Work& work) const {
        const int32_t* entry = counts + work.head * stride_counts + (work.tile - first_tile) * stride_counts_tile;
#pragma unroll
        for (int kind = 0; kind < KINDS; ++kind) work.num_groups[kind] = __ldg(entry + kind);
        if (work.num_groups[SHARED] == EVERY_GROUP) work.num_groups[SHARED] = work.tile * GROUPS_PER_TILE;
        work.num_columns = 0;
    }

    // The first key of the i-th group of a kind.
    __device__ __forceinline__ int group_key(const Work& work, int kind, int i) const {
        // A list is ascending. If it has as many groups as there are, its i-th group is i, and it need not be read.
        if (work.num_groups[SHARED] == work.tile * GROUPS_PER_TILE) return i * GROUP;
        // A list holds the shared groups, then those of the first half, then those of the second.
        const int before = kind == SHARED ? 0 : work.num_groups[SHARED] + (kind == 1 ? 0 : work.num_groups[1]);
        const int64_t list = work.head * stride_groups + (work.tile - first_tile) * stride_groups_tile;
        return __ldg(groups + list + before + i) * GROUP;
    }
};

// All groups, but only for the heads that are listed.
struct HeadIndex {
    static constexpr bool HAS_COLUMNS = false, LISTS_HEADS = true;

    const int32_t* heads;
    const int32_t* num_heads;

    __device__ __forceinline__ void count(Work& work) const {
        work.num_groups[SHARED] = work.tile * GROUPS_PER_TILE;
        for (int kind = SHARED + 1; kind < KINDS; ++kind) work.num_groups[kind] = 0;
        work.num_columns = 0;
    }

    __device__ __forceinline__ int group_key(const Work&, int, int i) const { return i * GROUP; }
};

}  // namespace attend
