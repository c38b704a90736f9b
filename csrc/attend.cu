// SPDX-License-Identifier: Apache-2.0
// Attention of a chunk over the keys that an index keeps, for Hopper (sm_90a): bf16, fp16 and FP8, head_dim 64 and 128.
// Entry points for minference_vllm/kernels/cuda/attend.py. The reference is minference_vllm/reference/attend.py.

#include "attend_kernel.cuh"
#include "cache_map.cuh"

// The structures are mirrored in minference_vllm/kernels/cuda/attend.py. Strides are in elements.

struct MInferenceAttendChunk {
    const void *q, *k, *v;
    void *out, *lse, *kept_pairs, *tile_counter;
    const void *block_table, *sinks;
    const void *q_scale, *k_scale, *v_scale;  // of FP8
    int64_t stride_q_row, stride_q_head, stride_out_row, stride_out_head;
    int64_t stride_page, stride_kv_head, stride_token, stride_lse, stride_q_scale, stride_k_scale, stride_v_scale;
    int32_t num_rows, context_len, num_qo_heads, num_kv_heads, head_dim, page_size, num_pages, is_bf16, is_fp8,
        num_programs, sinks_are_fp32;
    float scale_log2;
};

struct MInferenceAttendBands {
    MInferenceAttendChunk chunk;
    const void *bands, *bands_indptr, *band_halves, *columns, *columns_indptr;
    int64_t stride_bands, stride_bands_kind, stride_bands_indptr, stride_bands_indptr_kind, stride_band_halves,
        stride_columns, stride_columns_indptr;
};

struct MInferenceAttendTiles {
    MInferenceAttendChunk chunk;
    const void *groups, *counts;
    int64_t stride_groups, stride_groups_tile, stride_counts, stride_counts_tile;
    int32_t long_tiles;
};

struct MInferenceAttendHeads {
    MInferenceAttendChunk chunk;
    const void *heads, *num_heads;
};

static cudaError_t make_params(const MInferenceAttendChunk& a, attend::Params& p) {
    const hopper::Element element = a.is_fp8 ? hopper::Element::E4M3 : hopper::sixteen_bits(a.is_bf16);
    const int bytes = hopper::bytes_of(element);
    p.k = static_cast<const char*>(a.k);
    p.v = static_cast<const char*>(a.v);
    p.block_table = static_cast<const int32_t*>(a.block_table);
    p.sinks = a.sinks;
    p.out = a.out;
    p.lse = static_cast<float*>(a.lse);
    p.kept_pairs = static_cast<unsigned long long*>(a.kept_pairs);
    p.tile_counter = static_cast<unsigned*>(a.tile_counter);
    p.stride_page = a.stride_page * bytes;
    p.stride_kv_head = a.stride_kv_head * bytes;
    p.stride_token = a.stride_token * bytes;
    p.stride_out_row = a.stride_out_row;
    p.stride_out_head = a.stride_out_head;
    p.stride_lse = a.stride_lse;
    p.page_size = a.page_size;
    p.num_rows = a.num_rows;
    p.context_len = a.context_len;
    p.num_qo_heads = a.num_qo_heads;
    p.group_size = a.num_qo_heads / a.num_kv_heads;
    p.tiles_per_wave = a.num_programs / p.group_size > 0 ? a.num_programs / p.group_size : 1;
    p.sinks_are_fp32 = a.sinks_are_fp32;
    p.scale_log2 = a.scale_log2;
    p.q_scale = fp8::make_scale(a.q_scale, a.stride_q_scale);
    p.k_scale = fp8::make_scale(a.k_scale, a.stride_k_scale);
    p.v_scale = fp8::make_scale(a.v_scale, a.stride_v_scale);
    cudaError_t error = hopper::make_tensor_map<3>(
        &p.q_map, element, a.q, {uint64_t(a.head_dim), uint64_t(a.num_qo_heads), uint64_t(a.num_rows)},
        {a.stride_q_head, a.stride_q_row}, {hopper::box_elements(element, a.head_dim), 1, attend::HALF}
    );
    if (error == cudaSuccess) error = hopper::make_cache_map(&p.k_map, element, a.k, a, attend::GROUP);
    if (error == cudaSuccess) error = hopper::make_cache_map(&p.v_map, element, a.v, a, attend::GROUP);
    return error;
}

template <typename Index>
static cudaError_t attend_to(const MInferenceAttendChunk& a, const Index& index, cudaStream_t stream) {
    attend::Params p;
    if (const cudaError_t error = make_params(a, p); error != cudaSuccess) return error;
    if (a.is_fp8) return attend::launch_fp8(p, index, a.head_dim, a.is_bf16, a.num_programs, stream);
    if (a.head_dim == 128) {
        return a.is_bf16 ? attend::launch<__nv_bfloat16, __nv_bfloat16, 128>(p, index, a.num_programs, stream)
                         : attend::launch<__half, __half, 128>(p, index, a.num_programs, stream);
    }
    if (a.head_dim == 64) {
        return a.is_bf16 ? attend::launch<__nv_bfloat16, __nv_bfloat16, 64>(p, index, a.num_programs, stream)
                         : attend::launch<__half, __half, 64>(p, index, a.num_programs, stream);
    }
    return cudaErrorInvalidValue;
}

extern "C" int minference_attend_bands(const MInferenceAttendBands* args, cudaStream_t stream) {
    const MInferenceAttendBands& a = *args;
    attend::BandIndex index;
    index.bands = static_cast<const int32_t*>(a.bands);
    index.bands_indptr = static_cast<const int32_t*>(a.bands_indptr);
    index.band_halves = static_cast<const uint8_t*>(a.band_halves);
    index.columns = static_cast<const int32_t*>(a.columns);
    index.columns_indptr = static_cast<const int32_t*>(a.columns_indptr);
    index.stride_bands = a.stride_bands;
    index.stride_bands_kind = a.stride_bands_kind;
    index.stride_bands_indptr = a.stride_bands_indptr;
    index.stride_bands_indptr_kind = a.stride_bands_indptr_kind;
    index.stride_band_halves = a.stride_band_halves;
    index.stride_columns = a.stride_columns;
    index.stride_columns_indptr = a.stride_columns_indptr;
    return attend_to(a.chunk, index, stream);
}

extern "C" int minference_attend_tiles(const MInferenceAttendTiles* args, cudaStream_t stream) {
    const MInferenceAttendTiles& a = *args;
    attend::TileIndex index;
    index.groups = static_cast<const int32_t*>(a.groups);
    index.counts = static_cast<const int32_t*>(a.counts);
    index.stride_groups = a.stride_groups;
    index.stride_groups_tile = a.stride_groups_tile;
    index.stride_counts = a.stride_counts;
    index.stride_counts_tile = a.stride_counts_tile;
    index.first_tile = a.chunk.context_len / attend::TILE;
    index.long_tiles = a.long_tiles;
    return attend_to(a.chunk, index, stream);
}

extern "C" int minference_attend_heads(const MInferenceAttendHeads* args, cudaStream_t stream) {
    attend::HeadIndex index;
    index.heads = static_cast<const int32_t*>(args->heads);
    index.num_heads = static_cast<const int32_t*>(args->num_heads);
    return attend_to(args->chunk, index, stream);
}

extern "C" const char* minference_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
