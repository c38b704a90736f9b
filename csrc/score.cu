// SPDX-License-Identifier: Apache-2.0
// Scores sampled rows against means of keys, for Hopper (sm_90a), and sums the attention mass that the rows give to
// each group of four means before their tile. Products are in bf16 or fp16 with head_dim 64 and 128, or in FP8 with
// head_dim 128; queries are in bf16, fp16 or FP8. The reference is minference_vllm/reference/masses.py.

#include <cmath>

#include "score_stages.cuh"
#include "tensor_map.cuh"

namespace score {

// How many stages a range of means gets. Short ranges keep all multiprocessors busy, but each must be worth what a
// program costs besides its stages, mainly for loading its rows.
inline int choose_stages_each(const Params& p, int num_multiprocessors) {
    constexpr int START = 2, SHORTEST = 4;  // stages
    const int longest = p.num_stages(p.num_blocks - 1);
    const int64_t programs = int64_t(p.num_blocks) * p.num_kv_heads;
    const int64_t total = programs * (longest + p.num_stages(0)) / 2;
    int best = longest;
    int64_t least = INT64_MAX;
    for (int ranges = 1;; ++ranges) {
        const int each = (longest + ranges - 1) / ranges;
        if (ranges > 1 && each < SHORTEST) break;
        // Two upper bounds of the time for programs that are started one after another: `alike` as if all were as long
        // as the longest, `one_last` as if one of the longest started last.
        const int64_t waves = (programs * ranges + num_multiprocessors - 1) / num_multiprocessors;
        const int64_t alike = waves * (each + START);
        const int64_t one_last = (total + programs * ranges * START) / num_multiprocessors + each + START;
        const int64_t time = alike < one_last ? alike : one_last;
        if (time < least) {
            least = time;
            best = each;
        }
    }
    return best;
}

template <typename T, typename Q, int HEAD_DIM>
cudaError_t launch(const Params& p, cudaStream_t stream) {
    constexpr int BYTES = sizeof(Storage<HEAD_DIM * sizeof(T)>) + hopper::ATOM_BYTES;
    const int ranges = (p.num_stages(p.num_blocks - 1) + p.stages_each - 1) / p.stages_each;
    const auto kernel = mass_kernel<T, Q, HEAD_DIM>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (error != cudaSuccess) return error;
    kernel<<<p.num_blocks * p.num_kv_heads * ranges, THREADS, BYTES, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace score

// See minference_vllm/kernels/cuda/masses.py, which mirrors it. Strides are in elements.
struct MInferenceScore {
    const void *q, *means, *row_lse;
    void* masses;
    const void *boxes, *box_counts;  // int32, or null: see score.cuh
    const void *q_scale, *k_scale;   // of queries in FP8, and of the keys
    int64_t stride_q_row, stride_q_head, stride_means, stride_lse, stride_masses, stride_masses_part;
    int64_t stride_boxes_set, stride_boxes, stride_box_counts, stride_q_scale, stride_k_scale;
    int32_t num_rows, context_len, rows_per_half, num_qo_heads, num_kv_heads, head_dim;
    int32_t is_bf16;            // the model, otherwise it is fp16; so are queries and means that are not in FP8
    int32_t is_fp8, has_fp8_q;  // whether means are in E4M3, and whether queries are
    int32_t keys_per_mean;          // a power of two
    int32_t max_boxes;              // of a block, if `boxes` names them
    int32_t num_multiprocessors;
    float scale_log2;
    float squared;  // part of a group's mass: squared_for of the reference, less than 1
};

static score::Params make_params(const MInferenceScore& a) {
    const int bytes = a.has_fp8_q ? 1 : 2;  // of queries
    score::Params p{};
    p.q = static_cast<const char*>(a.q);
    p.row_lse = static_cast<const float*>(a.row_lse);
    p.masses = static_cast<uint8_t*>(a.masses);
    p.boxes = static_cast<const int32_t*>(a.boxes);
    p.box_counts = static_cast<const int32_t*>(a.box_counts);
    p.stride_boxes_set = a.stride_boxes_set;
    p.stride_boxes = a.stride_boxes;
    p.stride_box_counts = a.stride_box_counts;
    p.max_stages = (a.max_boxes + score::STAGE_BOXES - 1) / score::STAGE_BOXES;
    p.groups_per_tile = score::TILE / (a.keys_per_mean * score::MEANS_PER_GROUP);
    p.log2_mean = std::log2(float(a.keys_per_mean));
    p.stride_q_row = a.stride_q_row * bytes;
    p.stride_q_head = a.stride_q_head * bytes;
    p.stride_lse = a.stride_lse;
    p.stride_masses = a.stride_masses;
    p.stride_masses_part = a.stride_masses_part;
    p.num_rows = a.num_rows;
    p.context_len = a.context_len;
    p.row_stride = score::HALF / a.rows_per_half;
    p.group_size = a.num_qo_heads / a.num_kv_heads;
    p.num_kv_heads = a.num_kv_heads;
    const int end_tile = (a.context_len + a.num_rows + score::TILE - 1) / score::TILE;
    p.num_lists = (end_tile - p.first_tile()) * (score::TILE / (score::ROWS * p.row_stride)) * p.group_size;
    p.num_blocks = (p.num_lists + score::LISTS - 1) / score::LISTS;
    p.num_boxes = ((end_tile - 1) * p.groups_per_tile + score::BOX_GROUPS - 1) / score::BOX_GROUPS;
    p.scale_log2 = a.scale_log2;
    // Of w (1 - s + s w), w being a stored weight / UNIT.
    p.plain = (1 - a.squared) / score::UNIT;
    p.squared = a.squared / (1 - a.squared) / score::UNIT;
    p.q_scale = fp8::make_scale(a.q_scale, a.stride_q_scale);
    p.k_scale = fp8::make_scale(a.k_scale, a.stride_k_scale);
    return p;
}

//   T: type of the means if they are not in FP8.
//   Q: type of the queries.
template <typename T, typename Q>
static cudaError_t run(const MInferenceScore& a, const score::Params& p, cudaStream_t stream) {
    if (a.is_fp8) {
        return a.head_dim == 128 ? score::launch<hopper::E4M3, Q, 128>(p, stream) : cudaErrorInvalidValue;
    }
    if (a.head_dim == 128) return score::launch<T, Q, 128>(p, stream);
    if (a.head_dim == 64) return score::launch<T, Q, 64>(p, stream);
    return cudaErrorInvalidValue;
}

extern "C" int minference_group_masses(const MInferenceScore* args, cudaStream_t stream) {
    const MInferenceScore& a = *args;
    score::Params p = make_params(a);
    // The first tile of a request has no group before it.
    if (p.num_stages(p.num_blocks - 1) == 0) return cudaSuccess;
    p.stages_each = score::choose_stages_each(p, a.num_multiprocessors);
    // Coordinates: element, group, mean of the group, KV head.
    const uint64_t num_groups = uint64_t(p.num_boxes) * score::BOX_GROUPS;
    const hopper::Element element = a.is_fp8 ? hopper::Element::E4M3 : hopper::sixteen_bits(a.is_bf16);
    const uint32_t box_elements = hopper::SWIZZLE_BYTES / hopper::bytes_of(element);
    const cudaError_t error = hopper::make_tensor_map<4>(
        &p.means_map, element, a.means,
        {uint64_t(a.head_dim), num_groups, score::MEANS_PER_GROUP, uint64_t(a.num_kv_heads)},
        {score::MEANS_PER_GROUP * a.head_dim, a.head_dim, a.stride_means},
        {box_elements, score::BOX_GROUPS, score::MEANS_PER_GROUP, 1}
    );
    if (error != cudaSuccess) return error;
    using hopper::E4M3;
    if (a.has_fp8_q) return a.is_bf16 ? run<__nv_bfloat16, E4M3>(a, p, stream) : run<__half, E4M3>(a, p, stream);
    return a.is_bf16 ? run<__nv_bfloat16, __nv_bfloat16>(a, p, stream) : run<__half, __half>(a, p, stream);
}
