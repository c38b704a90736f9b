// SPDX-License-Identifier: Apache-2.0
// The keywords, types and functions of CUDA C++ that the kernels use, for g++.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;

struct float2 {
    float x, y;
};

inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};

struct Dim {
    int x;
};
inline Dim threadIdx, blockIdx, gridDim;

template <typename T>
T __ldg(const T* pointer) {
    return *pointer;
}

// Atomic without more effort, since one fibre runs at a time.
template <typename T>
void atomicAdd(T* address, T value) {
    *address += value;
}

inline uint32_t atomicInc(uint32_t* address, uint32_t last) {
    const uint32_t before = *address;
    *address = before >= last ? 0 : before + 1;
    return before;
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline int __float_as_int(float x) {
    int bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float __uint_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// Four bytes of `low` (numbers 0 to 3) and `high` (4 to 7). The lowest hexadecimal digit of `numbers` is that of the
// lowest byte.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t numbers) {
    const uint64_t bytes = uint64_t(high) << 32 | low;
    uint32_t chosen = 0;
    for (int i = 0; i < 4; ++i) chosen |= uint32_t(bytes >> 8 * (numbers >> 4 * i & 7) & 0xFF) << 8 * i;
    return chosen;
}
