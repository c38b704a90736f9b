// SPDX-License-Identifier: Apache-2.0
// The groups that tiles keep, for Hopper (sm_90a). Entry point for minference_vllm/kernels/cuda/groups.py. The twin:
// minference_vllm/reference/groups.py.

#include "select.cuh"

// Mirrored in minference_vllm/kernels/cuda/groups.py. Strides are in elements.
struct MInferenceSelect {
    void* masses;
    const void *left_out, *share;
    void *groups, *counts;
    int64_t stride_masses, stride_masses_part, stride_left_out, stride_groups, stride_groups_tile, stride_counts;
    int64_t rows_weight;
    int32_t num_rows, context_len, num_qo_heads, parts, sink_groups, local_groups, first_counted, max_kept;
};

extern "C" int minference_select_groups(const MInferenceSelect* args, cudaStream_t stream) {
    const MInferenceSelect& a = *args;
    selection::Params p{};
    p.masses = static_cast<uint8_t*>(a.masses);
    p.left_out = static_cast<const int64_t*>(a.left_out);
    p.share = static_cast<const float*>(a.share);
    p.groups = static_cast<int32_t*>(a.groups);
    p.counts = static_cast<int32_t*>(a.counts);
    p.stride_masses = a.stride_masses;
    p.stride_part = a.stride_masses_part;
    p.stride_left_out = a.stride_left_out;
    p.stride_groups = a.stride_groups;
    p.stride_groups_tile = a.stride_groups_tile;
    p.stride_counts = a.stride_counts;
    p.rows_weight = a.rows_weight;
    p.num_rows = a.num_rows;
    p.context_len = a.context_len;
    p.num_tiles = (a.context_len + a.num_rows + selection::TILE - 1) / selection::TILE - a.context_len / selection::TILE;
    p.sink_groups = a.sink_groups;
    p.local_groups = a.local_groups;
    p.first_counted = a.first_counted;
    p.max_kept = a.max_kept;
    switch (a.parts) {
        case 1: return selection::launch<1>(p, a.num_qo_heads, stream);
        case 2: return selection::launch<2>(p, a.num_qo_heads, stream);
        case 4: return selection::launch<4>(p, a.num_qo_heads, stream);
        default: return cudaErrorInvalidValue;
    }
}
