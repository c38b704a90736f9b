// SPDX-License-Identifier: Apache-2.0
// Selects the boxes that are scored finely and then, from the fine masses, the groups that tiles keep, for Hopper
// (sm_90a). Entry points for minference_vllm/kernels/cuda/select.py. The reference is
// minference_vllm/reference/groups.py and boxes.py.

#include "select_boxes.cuh"

// Mirrored in minference_vllm/kernels/cuda/select.py. Strides are in elements.
struct MInferenceSelect {
    void* masses;
    const void* share;
    void *groups, *counts;
    int64_t stride_masses, stride_masses_part, stride_groups, stride_groups_tile, stride_counts;
    int64_t rows_weight;
    int32_t num_rows, context_len, num_qo_heads, parts, sink_groups, local_groups, long_groups, first_counted, max_kept;
};

extern "C" int minference_select_groups(const MInferenceSelect* args, cudaStream_t stream) {
    const MInferenceSelect& a = *args;
    selection::Params p{};
    p.masses = static_cast<uint8_t*>(a.masses);
    p.share = static_cast<const float*>(a.share);
    p.groups = static_cast<int32_t*>(a.groups);
    p.counts = static_cast<int32_t*>(a.counts);
    p.stride_masses = a.stride_masses;
    p.stride_part = a.stride_masses_part;
    p.stride_groups = a.stride_groups;
    p.stride_groups_tile = a.stride_groups_tile;
    p.stride_counts = a.stride_counts;
    p.rows_weight = a.rows_weight;
    p.num_rows = a.num_rows;
    p.context_len = a.context_len;
    p.num_tiles = (a.context_len + a.num_rows + selection::TILE - 1) / selection::TILE - a.context_len / selection::TILE;
    p.sink_groups = a.sink_groups;
    p.local_groups = a.local_groups;
    p.long_groups = a.long_groups;
    p.first_counted = a.first_counted;
    p.max_kept = a.max_kept;
    switch (a.parts) {
        case 1: return selection::launch<1>(p, a.num_qo_heads, stream);
        case 2: return selection::launch<2>(p, a.num_qo_heads, stream);
        case 4: return selection::launch<4>(p, a.num_qo_heads, stream);
        default: return cudaErrorInvalidValue;
    }
}

struct MInferenceSelectBoxes {
    const void *box_masses, *share;
    void *numbers, *counts, *masses;
    int64_t stride_box_masses, stride_box_masses_part, stride_numbers, stride_numbers_block, stride_counts,
        stride_masses, stride_masses_part;  // of `masses`, in words of eight codes
    int64_t part_weight;
    double part_of_dropped;
    int32_t context_len, num_tiles, num_kv_heads, group_size, parts_per_tile, sink_boxes, local_boxes, max_boxes;
};

extern "C" int minference_select_boxes(const MInferenceSelectBoxes* args, cudaStream_t stream) {
    const MInferenceSelectBoxes& a = *args;
    selection::BoxParams p{};
    p.box_masses = static_cast<const uint8_t*>(a.box_masses);
    p.share = static_cast<const float*>(a.share);
    p.numbers = static_cast<int32_t*>(a.numbers);
    p.counts = static_cast<int32_t*>(a.counts);
    p.masses = static_cast<int64_t*>(a.masses);
    p.stride_box_masses = a.stride_box_masses;
    p.stride_box_part = a.stride_box_masses_part;
    p.stride_numbers = a.stride_numbers;
    p.stride_block = a.stride_numbers_block;
    p.stride_counts = a.stride_counts;
    p.stride_masses = a.stride_masses;
    p.stride_part = a.stride_masses_part;
    p.part_weight = a.part_weight;
    p.part_of_dropped = a.part_of_dropped;
    p.context_len = a.context_len;
    p.num_lists = a.num_tiles * a.parts_per_tile * a.group_size;
    p.num_blocks = (p.num_lists + selection::LISTS - 1) / selection::LISTS;
    p.group_size = a.group_size;
    p.parts_per_tile = a.parts_per_tile;
    p.sink_boxes = a.sink_boxes;
    p.local_boxes = a.local_boxes;
    p.max_boxes = a.max_boxes;
    return selection::launch_boxes(p, a.num_kv_heads, stream);
}
