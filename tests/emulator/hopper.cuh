// SPDX-License-Identifier: Apache-2.0
// Stands for csrc/hopper.cuh: the same functions, emulated.
//
// Not modelled: programs that run at the same time, the number of registers, any fence except the one between wgmma and
// what threads or cp.async have written, the weak memory order between threads, the hardware's rounding within a wgmma,
// bank conflicts, time.
#pragma once

#include <type_traits>

#include "hopper_sizes.cuh"
#include "runtime.cuh"

namespace hopper {

inline uint32_t shared_address(const void* pointer) { return emulator::address_of(pointer); }

// ---- barriers --------------------------------------------------------------------------------------------------

inline void init_barrier(uint64_t* barrier, int arrivals) { emulator::create_barrier(barrier, arrivals); }
inline void fence_barrier_init() {}
inline void arrive(uint64_t* barrier, uint32_t count = 1) { emulator::arrive(emulator::number_of(barrier), count); }
inline void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
    emulator::arrive(emulator::number_of(barrier), 1, bytes);
}
inline void arrive_after_copies(uint64_t* barrier) { emulator::arrive_after_copies(emulator::number_of(barrier)); }
inline void wait(uint64_t* barrier, uint32_t parity) { emulator::wait_for_phase(emulator::number_of(barrier), parity); }
inline void wait_named(int barrier, int threads) { emulator::wait_at_named(barrier, threads); }
inline void arrive_named(int barrier, int threads) { emulator::arrive_at_named(barrier, threads); }

// ---- copies ----------------------------------------------------------------------------------------------------

inline void copy_16_bytes(uint32_t destination, const void* source) {
    emulator::copy_piece(destination, static_cast<const char*>(source));
}

enum class CacheHint { EVICT_FIRST };

template <typename... Coordinates>
void copy_box(uint32_t destination, const CUtensorMap* map, uint64_t* barrier, Coordinates... x) {
    emulator::copy_box(destination, map, emulator::number_of(barrier), {x...});
}

template <typename... Coordinates>
void copy_box(uint32_t destination, const CUtensorMap* map, uint64_t* barrier, CacheHint, Coordinates... x) {
    copy_box(destination, map, barrier, x...);
}

inline void prefetch_box(const CUtensorMap*, int, int, int) {}
inline void prefetch_map(const CUtensorMap*) {}

// After the fence of any lane, its warp's wgmma see what cp.async has written: a wgmma begins only when all lanes have
// come, so the other lanes pass their fences before it. All wgmma see what this thread has stored itself.
inline void fence_async_proxy() {
    emulator::own_warp().fenced = emulator::now + 1;
    emulator::fence_own_stores();
}

// ---- shared memory ---------------------------------------------------------------------------------------------

inline uint4 load_16_bytes(uint32_t source) {
    uint4 x;
    emulator::load_piece(source, &x);
    return x;
}

inline void store_16_bytes(uint32_t destination, const uint4& x) { emulator::store_piece(destination, &x); }

// ---- registers, arithmetic -------------------------------------------------------------------------------------

template <int COUNT>
void more_registers() {
    emulator::meet("setmaxnreg");
}

template <int COUNT>
void fewer_registers() {
    emulator::meet("setmaxnreg");
}

inline float exp2_approx(float x) {
    constexpr float SMALLEST_NORMAL = 1.1754944e-38f;
    const float y = exp2f(x);
    return y < SMALLEST_NORMAL ? 0.0f : y;
}

inline float log2_approx(float x) { return log2f(x); }
inline float fma_saturate(float a, float b, float c) {
    const float d = fmaf(a, b, c);
    return std::isnan(d) ? 0.0f : min(max(d, 0.0f), 1.0f);
}

template <typename T>
constexpr bool IS_BF16 = std::is_same_v<T, __nv_bfloat16>;
template <typename T>
constexpr Element ELEMENT = std::is_same_v<T, E4M3> ? Element::E4M3 : IS_BF16<T> ? Element::BF16 : Element::FP16;

template <typename T>
uint32_t pack(float first, float second) {
    return emulator::narrow(first, IS_BF16<T>) | uint32_t(emulator::narrow(second, IS_BF16<T>)) << 16;
}

template <typename T>
float2 unpack(uint32_t packed) {
    return {emulator::widen(packed, ELEMENT<T>), emulator::widen(packed >> 16, ELEMENT<T>)};
}

inline uint32_t fma_half2(uint32_t a, uint32_t b, uint32_t c) {
    const float2 x = unpack<__half>(a), y = unpack<__half>(b), z = unpack<__half>(c);
    return pack<__half>(fmaf(x.x, y.x, z.x), fmaf(x.y, y.y, z.y));
}

inline uint32_t fma_half2_saturate(uint32_t a, uint32_t b, uint32_t c) {
    const float2 x = unpack<__half>(a), y = unpack<__half>(b), z = unpack<__half>(c);
    return pack<__half>(fma_saturate(x.x, y.x, z.x), fma_saturate(x.y, y.y, z.y));
}

inline uint32_t mul_half2(uint32_t a, uint32_t b) { return fma_half2(a, b, 0); }

inline uint32_t pack_e4m3(float2 first, float2 second) {
    uint32_t packed = 0;
    for (const float x : {second.y, second.x, first.y, first.x}) packed = packed << 8 | emulator::narrow_e4m3(x);
    return packed;
}

inline uint32_t e4m3_to_fp16(uint32_t packed, bool upper) {
    uint32_t wide = 0;
    for (const int place : {1, 0}) {
        const float x = emulator::widen_e4m3(packed >> (16 * upper + 8 * place));
        wide = wide << 16 | emulator::narrow(x, false);
    }
    return wide;
}

// ---- wgmma -----------------------------------------------------------------------------------------------------

inline void mma_fence() {}
inline void mma_commit() { emulator::commit(); }

template <int PENDING>
void mma_wait() {
    emulator::wait_for_products(PENDING);
}

inline uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }

template <typename T, int COUNT>
void pin(T (&)[COUNT]) {}

template <int ROW_BYTES = SWIZZLE_BYTES>
uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride = 8 * ROW_BYTES) {
    const uint64_t mode = SWIZZLE_BYTES / ROW_BYTES;
    return mode << 62 | uint64_t(stride >> 4) << 32 | uint64_t(leading >> 4) << 16 | (address & 0x3FFFF) >> 4;
}

// D has 64 rows, spread over 128 threads, so it has twice as many columns as a thread has registers.
template <typename T, bool ACCUMULATE, int COUNT>
void mma(float (&d)[COUNT], uint64_t a, uint64_t b) {
    emulator::issue({a, b, 2 * COUNT, ACCUMULATE, ELEMENT<T>, false}, d, nullptr);
}

// Sums in fp16, two in a register.
template <typename T, bool ACCUMULATE, int COUNT>
void mma(uint32_t (&d)[COUNT], uint64_t a, uint64_t b) {
    emulator::issue({a, b, 4 * COUNT, ACCUMULATE, ELEMENT<T>, false, true}, d, nullptr);
}

template <typename T, int COUNT>
void mma_add(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b) {
    emulator::issue({0, b, 2 * COUNT, true, ELEMENT<T>, true}, d, a);
}

}  // namespace hopper
