// SPDX-License-Identifier: Apache-2.0
// Attention of 64 probe rows per head over all keys, summed by column and by diagonal, for Hopper (sm_90a): bf16 and
// fp16, head_dim 64 and 128, and FP8, head_dim 128. The softmax is exact and takes two passes over the keys. The
// reference is minference_vllm/reference/probe.py.
//
// A program reads its keys once for all of its heads. Masses are integers, so that atomics give the same sums in any
// order.

#include "probe_lse.cuh"
#include "probe_mass.cuh"
#include "cache_map.cuh"

namespace probe {

constexpr int MAX_SHARED_BYTES = 227 * 1024;

// Into how many ranges to split the keys: the number that takes the least time if programs run in waves. Time is
// counted in tiles.
inline int choose_splits(int programs_a_split, int num_tiles, int max_splits, int num_multiprocessors) {
    constexpr int START = 4;  // what a program costs beyond its tiles, in tiles
    int best = 1;
    int64_t least = INT64_MAX;
    for (int splits = 1; splits <= max_splits && splits <= num_tiles; ++splits) {
        const int waves = (programs_a_split * splits + num_multiprocessors - 1) / num_multiprocessors;
        const int64_t tiles = int64_t(waves) * ((num_tiles + splits - 1) / splits + START);
        if (tiles < least) {
            least = tiles;
            best = splits;
        }
    }
    return best;
}

template <int ROW_BYTES>
cudaError_t launch(void (*kernel)(Params), const Params& p, cudaStream_t stream) {
    const int bytes = shared_bytes<ROW_BYTES>(p.batch_size, p.stages) + hopper::ATOM_BYTES;
    constexpr auto LIMIT = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, LIMIT, MAX_SHARED_BYTES);
    if (error != cudaSuccess) return error;
    kernel<<<p.num_kv_heads * p.batches * p.splits, THREADS, bytes, stream>>>(p);
    return cudaGetLastError();
}

template <typename T, int ROW_BYTES>
cudaError_t run(Params& p, cudaStream_t stream) {
    p.stages = MAX_STAGES;
    while (shared_bytes<ROW_BYTES>(p.batch_size, p.stages) + hopper::ATOM_BYTES > MAX_SHARED_BYTES) --p.stages;
    const cudaError_t error = launch<ROW_BYTES>(lse_kernel<T, ROW_BYTES>, p, stream);
    if (error != cudaSuccess || p.which == Which::HELD_OUT) return error;
    const auto kernel = p.which == Which::SPREAD ? mass_kernel<T, ROW_BYTES, true> : mass_kernel<T, ROW_BYTES, false>;
    return launch<ROW_BYTES>(kernel, p, stream);
}

// Even with the most heads that a program can have there is room for two stages, the fewest that overlap.
static_assert(shared_bytes<256>(MAX_HEADS, 2) + hopper::ATOM_BYTES <= MAX_SHARED_BYTES);

}  // namespace probe

// See minference_vllm/kernels/cuda/probe.py, which mirrors it. Strides are in elements.
struct MInferenceProbe {
    const void *q, *k, *block_table;
    const void *q_scale, *k_scale;  // of FP8
    void *partial_max, *partial_sum, *lse, *vertical, *slash;
    int64_t stride_q_row, stride_q_head, stride_page, stride_kv_head, stride_token, stride_lse, stride_mass;
    int64_t stride_q_scale, stride_k_scale;
    int32_t num_rows, context_len, num_qo_heads, num_kv_heads, head_dim, page_size, num_pages, is_bf16;
    int32_t is_fp8;      // queries and cache; otherwise they are bf16 or fp16
    int32_t max_splits;  // as many as the partial sums have room for
    int32_t num_multiprocessors;
    int32_t which;       // rows: see probe::Which
    int32_t accumulate;  // whether to add to the masses of other rows
    int32_t splits;      // output: number of ranges of keys, each with partial sums
    float scale_log2;
};

static hopper::Element element_of(const MInferenceProbe& a) {
    return a.is_fp8 ? hopper::Element::E4M3 : hopper::sixteen_bits(a.is_bf16);
}

static probe::Params make_params(const MInferenceProbe& a) {
    const int bytes = hopper::bytes_of(element_of(a));
    probe::Params p{};
    p.q = static_cast<const char*>(a.q);
    p.block_table = static_cast<const int32_t*>(a.block_table);
    p.partial_max = static_cast<float*>(a.partial_max);
    p.partial_sum = static_cast<float*>(a.partial_sum);
    p.lse = static_cast<float*>(a.lse);
    p.vertical = static_cast<int32_t*>(a.vertical);
    p.slash = static_cast<int32_t*>(a.slash);
    p.stride_q_row = a.stride_q_row * bytes;
    p.stride_q_head = a.stride_q_head * bytes;
    p.stride_lse = a.stride_lse;
    p.stride_mass = a.stride_mass;
    p.num_rows = a.num_rows;
    p.context_len = a.context_len;
    p.page_size = a.page_size;
    p.num_kv_heads = a.num_kv_heads;
    p.group_size = a.num_qo_heads / a.num_kv_heads;
    p.batches = (p.group_size + probe::MAX_HEADS - 1) / probe::MAX_HEADS;
    p.batch_size = (p.group_size + p.batches - 1) / p.batches;
    p.num_tiles = (a.context_len + a.num_rows + probe::TILE - 1) / probe::TILE;
    const int splits =
        probe::choose_splits(p.num_kv_heads * p.batches, p.num_tiles, a.max_splits, a.num_multiprocessors);
    p.tiles_each = (p.num_tiles + splits - 1) / splits;
    p.splits = (p.num_tiles + p.tiles_each - 1) / p.tiles_each;
    p.which = static_cast<probe::Which>(a.which);
    p.accumulate = a.accumulate;
    p.scale_log2 = a.scale_log2;
    p.q_scale = fp8::make_scale(a.q_scale, a.stride_q_scale);
    p.k_scale = fp8::make_scale(a.k_scale, a.stride_k_scale);
    return p;
}

static cudaError_t run(const MInferenceProbe& a, probe::Params& p, cudaStream_t stream) {
    const cudaError_t error = hopper::make_cache_map(&p.k_map, element_of(a), a.k, a, probe::BAND);
    if (error != cudaSuccess) return error;
    if (a.is_fp8) return a.head_dim == 128 ? probe::run<hopper::E4M3, 128>(p, stream) : cudaErrorInvalidValue;
    if (a.head_dim == 128) {
        return a.is_bf16 ? probe::run<__nv_bfloat16, 256>(p, stream) : probe::run<__half, 256>(p, stream);
    }
    if (a.head_dim == 64) {
        return a.is_bf16 ? probe::run<__nv_bfloat16, 128>(p, stream) : probe::run<__half, 128>(p, stream);
    }
    return cudaErrorInvalidValue;
}

extern "C" int minference_probe(const MInferenceProbe* args, cudaStream_t stream) {
    const MInferenceProbe& a = *args;
    probe::Params p = make_params(a);
    if (!a.accumulate) {
        const size_t width = size_t(a.context_len + a.num_rows) * sizeof(int32_t);
        const size_t pitch = a.stride_mass * sizeof(int32_t);
        const cudaError_t error = cudaMemset2DAsync(a.slash, pitch, 0, width, a.num_qo_heads, stream);
        if (error != cudaSuccess) return error;
    }
    return run(a, p, stream);
}

// The first pass alone: partial softmaxes of the rows, [num_qo_heads, splits, NUM_PROBES].
extern "C" int minference_probe_sums(MInferenceProbe* args, cudaStream_t stream) {
    probe::Params p = make_params(*args);
    args->splits = p.splits;
    return run(*args, p, stream);
}
