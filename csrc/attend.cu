// SPDX-License-Identifier: Apache-2.0
// Attention of a chunk over the keys that a SparseIndex keeps, for Hopper (sm_90a): bf16 and fp16, head_dim 64 and 128.
//
// A persistent, warp-specialised kernel: a producer warpgroup brings keys through the block table into a ring in shared
// memory, two consumer warpgroups of 64 query rows each attend to them. minference_vllm/reference/attend.py is its twin.

#include "attend_consume.cuh"
#include "attend_produce.cuh"
#include "cache_map.cuh"

namespace attend {

template <typename T, int HEAD_DIM>
__global__ void __launch_bounds__(THREADS, 1) attend_kernel(const __grid_constant__ Params p) {
    using S = Shape<HEAD_DIM>;
    extern __shared__ char raw[];
    // Swizzled atoms begin at multiples of 1024.
    const uint32_t gap = -hopper::shared_address(raw) & (hopper::ATOM_BYTES - 1);
    auto& shared = *reinterpret_cast<Storage<HEAD_DIM>*>(raw + gap);
    if (threadIdx.x == 0) {
        hopper::prefetch_map(&p.q_map);
        hopper::prefetch_map(&p.k_map);
        hopper::prefetch_map(&p.v_map);
        for (int i = 0; i < 2 * S::STAGES; ++i) {
            for (auto& full : shared.full[i / S::STAGES][i % S::STAGES]) hopper::init_barrier(&full, FULL_ARRIVALS);
            hopper::init_barrier(&shared.empty[i / S::STAGES][i % S::STAGES], EMPTY_ARRIVALS);
        }
        for (auto& full : shared.drawn_full) hopper::init_barrier(&full, 1);
        for (auto& empty : shared.drawn_empty) hopper::init_barrier(&empty, 2 * COPYING_WARPS);
        hopper::init_barrier(&shared.q_full, 1);
        hopper::init_barrier(&shared.q_empty, EMPTY_ARRIVALS);
        hopper::fence_barrier_init();
    }
    // No stage fills every slot: what is left must be finite, for zero times NaN is NaN.
    for (int i = threadIdx.x * 16; i < int(sizeof(shared.ring[VALUES])); i += THREADS * 16) {
        *reinterpret_cast<uint4*>(&shared.ring[VALUES][0][0] + i) = {};
    }
    hopper::fence_async_proxy();
    __syncthreads();

    // Read from lane 0: the compiler then knows that a warp does not part here.
    const int group = __shfl_sync(0xFFFFFFFF, int(threadIdx.x) / hopper::WARPGROUP, 0);
    const int thread = threadIdx.x % hopper::WARPGROUP;
    if (group == 0) {
        hopper::fewer_registers<PRODUCER_REGISTERS>();
        const int which = __shfl_sync(0xFFFFFFFF, thread / COPYING_THREADS, 0);
        produce<HEAD_DIM>(p, shared, which, thread % COPYING_THREADS);
    } else {
        hopper::more_registers<CONSUMER_REGISTERS>();
        consume<T, HEAD_DIM>(p, shared, group - 1, thread);
    }
}

template <typename T, int HEAD_DIM>
cudaError_t launch(const Params& p, int num_programs, cudaStream_t stream) {
    constexpr int BYTES = sizeof(Storage<HEAD_DIM>) + hopper::ATOM_BYTES;
    const auto kernel = attend_kernel<T, HEAD_DIM>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (error != cudaSuccess) return error;
    kernel<<<num_programs, THREADS, BYTES, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace attend

// See minference_vllm/kernels/cuda/attend.py, which mirrors it. Strides are in elements.
struct MInferenceAttend {
    const void *q, *k, *v;
    void *out, *lse, *kept_pairs, *num_drawn;
    const void *block_table, *bands, *bands_below, *band_halves, *columns, *columns_below;
    int64_t stride_q_row, stride_q_head, stride_out_row, stride_out_head;
    int64_t stride_page, stride_kv_head, stride_token, stride_lse;
    int64_t stride_bands, stride_bands_kind, stride_below, stride_below_kind, stride_halves, stride_columns,
        stride_columns_below;
    int32_t num_rows, context_len, num_qo_heads, num_kv_heads, head_dim, page_size, num_pages, is_bf16, num_programs;
    float scale_log2;
};

static cudaError_t describe_tensors(const MInferenceAttend& a, attend::Params& p) {
    cudaError_t error = hopper::make_tensor_map<3>(
        &p.q_map, a.is_bf16, a.q, {uint64_t(a.head_dim), uint64_t(a.num_qo_heads), uint64_t(a.num_rows)},
        {a.stride_q_head, a.stride_q_row}, {hopper::BOX_ELEMENTS, 1, attend::HALF}
    );
    if (error == cudaSuccess) error = hopper::make_cache_map(&p.k_map, a.k, a, attend::BAND);
    if (error == cudaSuccess) error = hopper::make_cache_map(&p.v_map, a.v, a, attend::BAND);
    return error;
}

extern "C" int minference_attend(const MInferenceAttend* args, cudaStream_t stream) {
    const MInferenceAttend& a = *args;
    constexpr int ELEMENT = 2;  // bytes
    attend::Params p;
    if (const cudaError_t error = describe_tensors(a, p); error != cudaSuccess) return error;
    p.k = static_cast<const char*>(a.k);
    p.v = static_cast<const char*>(a.v);
    p.num_drawn = static_cast<unsigned*>(a.num_drawn);
    p.block_table = static_cast<const int32_t*>(a.block_table);
    p.out = a.out;
    p.lse = static_cast<float*>(a.lse);
    p.kept_pairs = static_cast<unsigned long long*>(a.kept_pairs);
    p.bands = static_cast<const int32_t*>(a.bands);
    p.bands_below = static_cast<const int32_t*>(a.bands_below);
    p.band_halves = static_cast<const uint8_t*>(a.band_halves);
    p.columns = static_cast<const int32_t*>(a.columns);
    p.columns_below = static_cast<const int32_t*>(a.columns_below);
    p.stride_page = a.stride_page * ELEMENT;
    p.stride_kv_head = a.stride_kv_head * ELEMENT;
    p.stride_token = a.stride_token * ELEMENT;
    p.stride_out_row = a.stride_out_row;
    p.stride_out_head = a.stride_out_head;
    p.stride_lse = a.stride_lse;
    p.stride_bands = a.stride_bands;
    p.stride_bands_kind = a.stride_bands_kind;
    p.stride_below = a.stride_below;
    p.stride_below_kind = a.stride_below_kind;
    p.stride_halves = a.stride_halves;
    p.stride_columns = a.stride_columns;
    p.stride_columns_below = a.stride_columns_below;
    p.page_size = a.page_size;
    p.num_rows = a.num_rows;
    p.context_len = a.context_len;
    p.num_qo_heads = a.num_qo_heads;
    p.group = a.num_qo_heads / a.num_kv_heads;
    p.heads_a_wave = a.num_programs / p.group > 0 ? a.num_programs / p.group : 1;
    p.scale_log2 = a.scale_log2;
    if (a.head_dim == 128) {
        return a.is_bf16 ? attend::launch<__nv_bfloat16, 128>(p, a.num_programs, stream)
                         : attend::launch<__half, 128>(p, a.num_programs, stream);
    }
    if (a.head_dim == 64) {
        return a.is_bf16 ? attend::launch<__nv_bfloat16, 64>(p, a.num_programs, stream)
                         : attend::launch<__half, 64>(p, a.num_programs, stream);
    }
    return cudaErrorInvalidValue;
}

extern "C" const char* minference_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
