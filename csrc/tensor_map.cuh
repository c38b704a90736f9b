// SPDX-License-Identifier: Apache-2.0
// Host side: descriptions of tensors in global memory for the bulk copy engine (TMA).
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "hopper_sizes.cuh"

namespace hopper {

// The driver's encoder, looked up at run time so that the library need not be linked to libcuda.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    static const auto encoder = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result;
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
        const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
        return found ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function) : nullptr;
    }();
    return encoder;
}

// There is no tensor map type for FP8; its bytes are copied as integers.
inline CUtensorMapDataType data_type(Element element) {
    if (element == Element::E4M3) return CU_TENSOR_MAP_DATA_TYPE_UINT8;
    return element == Element::BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

// Describe a tensor whose first dimension is contiguous.
//   sizes: in elements.
//   strides: elements between neighbours along each dimension but the first.
//   box: sizes of what one copy brings: rows of 128 or 64 bytes, swizzled. Where it reaches beyond the tensor it brings
//       zeros.
template <int RANK>
cudaError_t make_tensor_map(
    CUtensorMap* map, Element element, const void* base, const uint64_t (&sizes)[RANK],
    const int64_t (&strides)[RANK - 1], const uint32_t (&box)[RANK]
) {
    const auto encode = tensor_map_encoder();
    if (encode == nullptr) return cudaErrorNotSupported;
    cuuint64_t bytes[RANK - 1];
    cuuint32_t steps[RANK];
    for (int i = 0; i < RANK; ++i) steps[i] = 1;
    for (int i = 0; i + 1 < RANK; ++i) bytes[i] = uint64_t(strides[i]) * bytes_of(element);
    const uint32_t row_bytes = box[0] * bytes_of(element);
    if (row_bytes != SWIZZLE_BYTES && row_bytes != SWIZZLE_BYTES / 2) return cudaErrorInvalidValue;
    const auto swizzle = row_bytes == SWIZZLE_BYTES ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    const CUresult result = encode(
        map, data_type(element), RANK, const_cast<void*>(base), sizes, bytes, box, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
    );
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace hopper
