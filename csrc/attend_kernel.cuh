// SPDX-License-Identifier: Apache-2.0
// The attention kernel: a persistent program (thread block) per multiprocessor, specialised by warpgroup. A producer
// warpgroup finds keys and values through the block table and copies them into a ring in shared memory; it also
// converts values in FP8. Two consumer warpgroups attend for 64 query rows each.
#pragma once

#include "attend_consume.cuh"
#include "attend_convert.cuh"
#include "attend_index.cuh"
#include "attend_produce.cuh"

namespace attend {

// Set up the barriers, and fill the slots for values with zeros.
template <typename Stored, int HEAD_DIM>
__device__ __forceinline__ void set_up(const Params& p, Storage<Stored, HEAD_DIM>& shared) {
    using S = Shape<Stored, HEAD_DIM>;
    if (threadIdx.x == 0) {
        hopper::prefetch_map(&p.q_map);
        hopper::prefetch_map(&p.k_map);
        hopper::prefetch_map(&p.v_map);
        for (int i = 0; i < 2 * S::STAGES; ++i) {
            const int which = i / S::STAGES, slot = i % S::STAGES;
            // Slots of values to be converted are emptied by the warps that convert, all others by the consumers.
            const bool is_converted = S::CONVERTS && which == VALUES;
            for (auto& full : shared.full[which][slot]) hopper::init_barrier(&full, S::FULL_ARRIVALS);
            hopper::init_barrier(&shared.empty[which][slot], is_converted ? S::CONVERTING_WARPS : EMPTY_ARRIVALS);
        }
        if constexpr (S::CONVERTS) {
            for (int slot = 0; slot < S::STAGES; ++slot) {
                for (auto& full : shared.converted_full[slot]) hopper::init_barrier(&full, S::CONVERTING_WARPS);
                hopper::init_barrier(&shared.converted_empty[slot], EMPTY_ARRIVALS);
            }
        }
        for (auto& full : shared.drawn_full) hopper::init_barrier(&full, 1);
        for (auto& empty : shared.drawn_empty) hopper::init_barrier(&empty, 2 * S::COPYING_WARPS);
        hopper::init_barrier(&shared.q_full, 1);
        hopper::init_barrier(&shared.q_empty, EMPTY_ARRIVALS);
        hopper::fence_barrier_init();
    }
    // A stage need not fill its slot, and what the rest of the slot holds is multiplied by probabilities of zero. It
    // must be finite, since zero times NaN is NaN.
    for (int i = threadIdx.x * 16; i < int(sizeof(shared.ring[VALUES])); i += THREADS * 16) {
        *reinterpret_cast<uint4*>(&shared.ring[VALUES][0][0] + i) = {};
    }
    hopper::fence_async_proxy();
    __syncthreads();
}

//   T: type of the output.
template <typename T, typename Stored, int HEAD_DIM, typename Index>
__global__ void __launch_bounds__(THREADS, 1)
attend_kernel(const __grid_constant__ Params p, const __grid_constant__ Index index) {
    using S = Shape<Stored, HEAD_DIM>;
    if constexpr (Index::LISTS_HEADS) {
        if (__ldg(index.num_heads) == 0) return;
    }
    extern __shared__ char raw[];
    // Swizzle atoms must begin at multiples of 1024 bytes, which dynamic shared memory need not do.
    const uint32_t gap = -hopper::shared_address(raw) & (hopper::ATOM_BYTES - 1);
    auto& shared = *reinterpret_cast<Storage<Stored, HEAD_DIM>*>(raw + gap);
    set_up(p, shared);

    // The broadcast from lane 0 tells the compiler that all lanes of a warp take the same branch.
    const int warpgroup = __shfl_sync(0xFFFFFFFF, int(threadIdx.x) / hopper::WARPGROUP, 0);
    const int thread = threadIdx.x % hopper::WARPGROUP;
    if (warpgroup == 0) {
        hopper::fewer_registers<S::PRODUCER_REGISTERS>();
        const int which = __shfl_sync(0xFFFFFFFF, thread / S::COPYING_THREADS, 0);
        if constexpr (S::CONVERTS) {
            if (which > VALUES) {
                convert(shared, thread - 2 * S::COPYING_THREADS);
                return;
            }
        }
        produce(p, index, shared, which, thread % S::COPYING_THREADS);
    } else {
        hopper::more_registers<S::CONSUMER_REGISTERS>();
        consume<T, Stored, HEAD_DIM, Index>(p, shared, warpgroup - 1, thread);
    }
}

template <typename T, typename Stored, int HEAD_DIM, typename Index>
cudaError_t launch(const Params& p, const Index& index, int num_programs, cudaStream_t stream) {
    constexpr int BYTES = sizeof(Storage<Stored, HEAD_DIM>) + hopper::ATOM_BYTES;
    const auto kernel = attend_kernel<T, Stored, HEAD_DIM, Index>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
    if (error != cudaSuccess) return error;
    kernel<<<num_programs, THREADS, BYTES, stream>>>(p, index);
    return cudaGetLastError();
}

// The same for queries and a cache in FP8: see attend_fp8.cu.
//   is_bf16: whether the output is bf16; otherwise it is fp16.
template <typename Index>
cudaError_t launch_fp8(
    const Params& p, const Index& index, int head_dim, bool is_bf16, int num_programs, cudaStream_t stream
);

}  // namespace attend
