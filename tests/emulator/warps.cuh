// SPDX-License-Identifier: Apache-2.0
// What the lanes of a warp do together: shuffles, votes, and the state of their wgmma.
#pragma once

#include <deque>

#include "barriers.cuh"
#include "hopper_sizes.cuh"

namespace emulator {

constexpr int LANES = 32;

// One wgmma of a warp: 16 of its 64 rows.
struct Product {
    uint64_t a, b;  // descriptors; `a` is unused if A comes from registers
    int columns;
    bool accumulate;
    hopper::Element element;  // of a and b
    bool from_registers;
    bool in_fp16 = false;       // the accumulators, two in a register
    int lanes = 0;              // lanes that have issued it
    void* accumulators[LANES];  // of each lane
    const uint32_t* a_registers[LANES];
    uint64_t fenced;  // the product sees what cp.async wrote before this turn

    int depth() const { return hopper::MMA_BYTES / hopper::bytes_of(element); }
    bool is_issued() const { return lanes == LANES; }
};

struct Warp {
    uint64_t given[2][LANES];  // each lane's value in the current collective and in the one before
    int arrived = 0;
    long generation = 0;
    const char* collective;

    std::deque<Product> products;  // issued, not yet carried out
    long carried_out = 0;
    long issued[LANES] = {};             // by each lane
    std::vector<long> committed[LANES];  // what each lane had issued at each commit not yet waited for
    uint64_t fenced = 0;

    uint64_t asleep_until = 0;
};

inline std::vector<Warp> warps;

inline int lane() { return threadIdx.x % LANES; }
inline Warp& own_warp() { return warps[threadIdx.x / LANES]; }

// All lanes come to the same collective before any leaves it. Returns what each lane gave.
inline const uint64_t (&meet(const char* collective, uint64_t value = 0))[LANES] {
    Warp& warp = own_warp();
    const long generation = warp.generation;
    auto& given = warp.given[generation % 2];
    given[lane()] = value;
    if (warp.arrived == 0) warp.collective = collective;
    const bool is_same = strcmp(warp.collective, collective) == 0;
    EMULATOR_CHECK(is_same, "lanes of a warp have parted: %s and %s", warp.collective, collective);
    if (++warp.arrived == LANES) {
        warp.arrived = 0;
        ++warp.generation;
    }
    const auto all_came = [&] { return warp.generation != generation; };
    if (!all_came() || !draw(4)) wait_until(all_came, collective);
    return given;
}

}  // namespace emulator

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    EMULATOR_CHECK(from >= 0 && from < emulator::LANES, "shuffle from lane %d", from);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    memcpy(&value, &emulator::meet("shuffle", bits)[from], sizeof value);
    return value;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
    return __shfl_sync(mask, value, emulator::lane() ^ other);
}

inline uint32_t __ballot_sync(unsigned, int vote) {
    const auto& votes = emulator::meet("ballot", vote != 0);
    uint32_t bits = 0;
    for (int i = 0; i < emulator::LANES; ++i) bits |= uint32_t(votes[i]) << i;
    return bits;
}

inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline void __syncwarp() { emulator::meet("syncwarp"); }
inline void __syncthreads() { emulator::wait_at_named(0, emulator::fibres.size()); }
