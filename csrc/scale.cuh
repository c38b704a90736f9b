// SPDX-License-Identifier: Apache-2.0
// Scales of FP8. They stay in device memory, and kernels read them when they need them.
#pragma once

#include <cstdint>

namespace fp8 {

// What stored numbers are multiplied by, one for each KV head.
struct Scale {
    const float* of_heads;
    int64_t stride;

    __device__ __forceinline__ float operator[](int kv_head) const { return __ldg(of_heads + kv_head * stride); }
};

inline Scale make_scale(const void* of_heads, int64_t stride) { return {static_cast<const float*>(of_heads), stride}; }

}  // namespace fp8
