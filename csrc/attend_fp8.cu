// SPDX-License-Identifier: Apache-2.0
// The attention kernels for queries, keys and values in FP8. There are as many of them as in attend.cu, and as a source
// file of their own they compile at the same time.

#include "attend_kernel.cuh"

namespace attend {

template <typename T, typename Index>
static cudaError_t launch_of(
    const Params& p, const Index& index, int head_dim, int num_programs, cudaStream_t stream
) {
    if (head_dim == 128) return launch<T, hopper::E4M3, 128>(p, index, num_programs, stream);
    if (head_dim == 64) return launch<T, hopper::E4M3, 64>(p, index, num_programs, stream);
    return cudaErrorInvalidValue;
}

template <typename Index>
cudaError_t launch_fp8(
    const Params& p, const Index& index, int head_dim, bool is_bf16, int num_programs, cudaStream_t stream
) {
    return is_bf16 ? launch_of<__nv_bfloat16>(p, index, head_dim, num_programs, stream)
                   : launch_of<__half>(p, index, head_dim, num_programs, stream);
}

template cudaError_t launch_fp8(const Params&, const BandIndex&, int, bool, int, cudaStream_t);
template cudaError_t launch_fp8(const Params&, const TileIndex&, int, bool, int, cudaStream_t);
template cudaError_t launch_fp8(const Params&, const HeadIndex&, int, bool, int, cudaStream_t);

}  // namespace attend
