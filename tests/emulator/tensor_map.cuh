// SPDX-License-Identifier: Apache-2.0
// Stands for csrc/tensor_map.cuh.
#pragma once

#include "hopper_sizes.cuh"
#include "runtime.cuh"

namespace hopper {

template <int RANK>
cudaError_t make_tensor_map(
    CUtensorMap* map, Element element, const void* base, const uint64_t (&sizes)[RANK],
    const int64_t (&strides)[RANK - 1], const uint32_t (&box)[RANK]
) {
    *map = {static_cast<const char*>(base), RANK, bytes_of(element)};
    map->strides[0] = 1;
    std::copy(strides, strides + RANK - 1, map->strides + 1);
    std::copy(sizes, sizes + RANK, map->sizes);
    std::copy(box, box + RANK, map->box);
    for (const int64_t stride : strides) {
        if (stride * bytes_of(element) % 16 != 0) return cudaErrorInvalidValue;
    }
    const int row_bytes = box[0] * bytes_of(element);
    if (row_bytes != 128 && row_bytes != 64) return cudaErrorInvalidValue;
    emulator::described.push_back(*map);
    return cudaSuccess;
}

}  // namespace hopper
