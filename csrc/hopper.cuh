// SPDX-License-Identifier: Apache-2.0
// Wrappers of the PTX instructions for Hopper (sm_90a) that the kernels use: mbarriers, asynchronous copies, wgmma.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "hopper_sizes.cuh"

namespace hopper {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarriers -------------------------------------------------------------------------------------------------

__device__ __forceinline__ void init_barrier(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
}

__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(uint64_t* barrier, uint32_t count = 1) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

// Arrive, and keep the phase open until `bytes` of bulk copies have landed too.
__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Arrive once all cp.async of this thread have landed. This counts among the arrivals that the barrier was initialised
// with (noinc).
__device__ __forceinline__ void arrive_after_copies(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Wait until the phase of this parity is complete. On a fresh barrier a wait with parity 1 returns at once, so that a
// producer need not treat the first round of empty slots differently.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// ---- named barriers --------------------------------------------------------------------------------------------

__device__ __forceinline__ void wait_named(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void arrive_named(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- copies ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void copy_16_bytes(uint32_t destination, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source) : "memory");
}

// L2 eviction policies, in the encoding that the instruction createpolicy returns.
enum class CacheHint : uint64_t { EVICT_FIRST = 0x12F0000000000000 };

__device__ __forceinline__ void copy_box(
    uint32_t destination, const CUtensorMap* map, uint64_t* barrier, CacheHint hint, int x0, int x1, int x2
) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
        "[%1, {%3, %4, %5}], [%2], %6;" ::"r"(destination),
        "l"(map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "r"(x2), "l"(hint)
        : "memory");
}

__device__ __forceinline__ void copy_box(
    uint32_t destination, const CUtensorMap* map, uint64_t* barrier, int x0, int x1, int x2, int x3
) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(destination),
        "l"(map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
        : "memory");
}

// Copy a box into L2 only.
__device__ __forceinline__ void prefetch_box(const CUtensorMap* map, int x0, int x1, int x2) {
    asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global [%0, {%1, %2, %3}];" ::"l"(map), "r"(x0), "r"(x1), "r"(x2)
                 : "memory");
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Make visible to wgmma what cp.async or this thread has written to shared memory. They write through the generic
// proxy, wgmma reads through the async proxy.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- shared memory ---------------------------------------------------------------------------------------------

__device__ __forceinline__ uint4 load_16_bytes(uint32_t source) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(source)
                 : "memory");
    return x;
}

__device__ __forceinline__ void store_16_bytes(uint32_t destination, const uint4& x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(destination), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}

// ---- registers, arithmetic ------------------------------------------------------------------------------------

template <int COUNT>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Volatile, so that the compiler does not move it behind a wait that follows.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float log2_approx(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// a b + c, clamped to [0, 1]; NaN becomes 0.
__device__ __forceinline__ float fma_saturate(float a, float b, float c) {
    float d;
    asm volatile("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(a), "f"(b), "f"(c));
    return d;
}

// Two numbers side by side, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float first, float second) {
    uint32_t packed;
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(second), "f"(first));
    }
    return packed;
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t packed) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xFFFF0000));
    } else {
        return __half22float2(*reinterpret_cast<const __half2*>(&packed));
    }
}

// a b + c for two numbers in fp16 side by side; the second form is clamped to [0, 1]. Volatile, so that the compiler does
// not move them behind a wait that follows.
__device__ __forceinline__ uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm volatile("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ uint32_t fma_half2_saturate(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm volatile("fma.rn.sat.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ __forceinline__ uint32_t mul_half2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm volatile("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// Four numbers as E4M3, the first in the low byte: rounded to nearest even and saturated at 448.
__device__ __forceinline__ uint32_t pack_e4m3(float2 first, float2 second) {
    uint16_t low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(first.y), "f"(first.x));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(second.y), "f"(second.x));
    return low | uint32_t(high) << 16;
}

// The lower or the upper two of four E4M3 numbers as a pair of fp16, which represents each of them exactly.
__device__ __forceinline__ uint32_t e4m3_to_fp16(uint32_t packed, bool upper) {
    uint32_t wide;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(wide) : "h"(uint16_t(upper ? packed >> 16 : packed)));
    return wide;
}

// ---- wgmma -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most PENDING committed groups still run.
template <int PENDING>
__device__ __forceinline__ void mma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The descriptor of a matrix that begins `bytes` later. Addresses in descriptors count units of 16 bytes.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

// Keep the compiler from reading an accumulator before the wait for it.
template <int COUNT>
__device__ __forceinline__ void pin(float (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int COUNT>
__device__ __forceinline__ void pin(uint32_t (&registers)[COUNT]) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// Descriptor of a matrix in shared memory that is swizzled in rows of ROW_BYTES. `stride` is the distance in bytes
// between groups of 8 rows. `leading` is the distance between blocks of 64 elements along the contiguous dimension; it
// matters only if wgmma sums over the other dimension (an MN-major matrix).
template <int ROW_BYTES = SWIZZLE_BYTES>
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride = 8 * ROW_BYTES) {
    static_assert(ROW_BYTES == 128 || ROW_BYTES == 64);
    constexpr uint64_t MODE = ROW_BYTES == 128 ? 1 : 2;  // swizzling in rows of 128 or 64 bytes
    return MODE << 62 | uint64_t(stride >> 4) << 32 | uint64_t(leading >> 4) << 16 | (address & 0x3FFFF) >> 4;
}

#define HOPPER_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HOPPER_16(d, i) HOPPER_4(d, i), HOPPER_4(d, i + 4), HOPPER_4(d, i + 8), HOPPER_4(d, i + 12)
#define HOPPER_NAMES_32                                                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define HOPPER_NAMES_64                                                                                              \
    HOPPER_NAMES_32                                                                                                  \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "    \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

#define HOPPER_PAIRS_4(d, i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define HOPPER_PAIRS_16(d, i) \
    HOPPER_PAIRS_4(d, i), HOPPER_PAIRS_4(d, i + 4), HOPPER_PAIRS_4(d, i + 8), HOPPER_PAIRS_4(d, i + 12)

// D (+)= A B of 64 x 128 x 16, or 64 x 128 x 32 for E4M3. A and B lie in shared memory and are contiguous along the
// dimension that is summed over (K-major).
//
// The immediates are the signs of A and B, then whether A and B are MN-major, which E4M3 cannot be.
template <typename T, bool ACCUMULATE>
__device__ __forceinline__ void mma(float (&d)[64], uint64_t a, uint64_t b) {
#define HOPPER_MMA(DEPTH, TYPE, ORDER)                                                                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128" DEPTH \
                 ".f32." TYPE "." TYPE " {" HOPPER_NAMES_64 "}, %64, %65, p, 1, 1" ORDER ";\n}\n"        \
                 : HOPPER_16(d, 0), HOPPER_16(d, 16), HOPPER_16(d, 32), HOPPER_16(d, 48)                 \
                 : "l"(a), "l"(b), "n"(int(ACCUMULATE)))
    if constexpr (std::is_same_v<T, E4M3>) {
        HOPPER_MMA("k32", "e4m3", "");
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        HOPPER_MMA("k16", "bf16", ", 0, 0");
    } else {
        HOPPER_MMA("k16", "f16", ", 0, 0");
    }
#undef HOPPER_MMA
}

// The same for E4M3 with sums in fp16: a register holds those of two neighbouring columns.
template <typename T, bool ACCUMULATE>
__device__ __forceinline__ void mma(uint32_t (&d)[32], uint64_t a, uint64_t b) {
    static_assert(std::is_same_v<T, E4M3>);
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n128k32.f16.e4m3.e4m3 {"
                 HOPPER_NAMES_32 "}, %32, %33, p, 1, 1;\n}\n"
                 : HOPPER_PAIRS_16(d, 0), HOPPER_PAIRS_16(d, 16)
                 : "l"(a), "l"(b), "n"(int(ACCUMULATE)));
}

// D += A B of 64 x N x 16. A lies in registers; B lies in shared memory and is contiguous along N (MN-major). N is 128
// or 64: twice as many as a thread has registers of D. The immediates: accumulate, the signs of A and B, B is MN-major.
template <typename T>
__device__ __forceinline__ void mma_add(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
#define HOPPER_MMA(TYPE)                                                                                             \
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" HOPPER_NAMES_64                   \
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"                                                       \
                 : HOPPER_16(d, 0), HOPPER_16(d, 16), HOPPER_16(d, 32), HOPPER_16(d, 48)                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        HOPPER_MMA("bf16");
    } else {
        HOPPER_MMA("f16");
    }
#undef HOPPER_MMA
}

template <typename T>
__device__ __forceinline__ void mma_add(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
#define HOPPER_MMA(TYPE)                                                                                            \
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" HOPPER_NAMES_32                   \
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"                                                      \
                 : HOPPER_16(d, 0), HOPPER_16(d, 16)                                                                \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        HOPPER_MMA("bf16");
    } else {
        HOPPER_MMA("f16");
    }
#undef HOPPER_MMA
}

// D (+)= A B of 64 x 64 x 16, or 64 x 64 x 32 for E4M3. A and B lie in shared memory, both K-major.
template <typename T, bool ACCUMULATE>
__device__ __forceinline__ void mma(float (&d)[32], uint64_t a, uint64_t b) {
#define HOPPER_MMA(DEPTH, TYPE, ORDER)                                                                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64" DEPTH \
                 ".f32." TYPE "." TYPE " {" HOPPER_NAMES_32 "}, %32, %33, p, 1, 1" ORDER ";\n}\n"       \
                 : HOPPER_16(d, 0), HOPPER_16(d, 16)                                                    \
                 : "l"(a), "l"(b), "n"(int(ACCUMULATE)))
    if constexpr (std::is_same_v<T, E4M3>) {
        HOPPER_MMA("k32", "e4m3", "");
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        HOPPER_MMA("k16", "bf16", ", 0, 0");
    } else {
        HOPPER_MMA("k16", "f16", ", 0, 0");
    }
#undef HOPPER_MMA
}

#undef HOPPER_4
#undef HOPPER_16
#undef HOPPER_PAIRS_4
#undef HOPPER_PAIRS_16
#undef HOPPER_NAMES_32
#undef HOPPER_NAMES_64

}  // namespace hopper
