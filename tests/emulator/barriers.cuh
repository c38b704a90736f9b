// SPDX-License-Identifier: Apache-2.0
// mbarriers and named barriers.
#pragma once

#include <climits>

#include "shared.cuh"

namespace emulator {

struct Barrier {
    int count, pending;  // arrivals: of a whole phase, and still to come in this one
    long bytes = 0;      // of bulk copies, still to come in this phase
    int phase = 0;
    std::vector<int> due;  // the phase that each thread must wait for next
};

constexpr int NEVER_WAITED = INT_MIN;
// The word of a barrier in shared memory holds its number and, in the upper half, a mark that nothing else writes.
constexpr uint64_t MARK = 0xBA55ull << 32;

inline std::vector<Barrier> barriers;

inline int number_of(const uint64_t* barrier) {
    const bool is_barrier = *barrier >> 32 == MARK >> 32 && uint32_t(*barrier) < barriers.size();
    EMULATOR_CHECK(is_barrier, "no barrier at shared address %u", address_of(barrier));
    return uint32_t(*barrier);
}

inline void create_barrier(uint64_t* barrier, int count) {
    locate(address_of(barrier));
    *barrier = MARK | barriers.size();
    barriers.push_back({count, count});
    barriers.back().due.assign(fibres.size(), NEVER_WAITED);
}

inline void end_phase_if_complete(int number) {
    Barrier& barrier = barriers[number];
    EMULATOR_CHECK(barrier.bytes >= 0, "barrier %d: more bytes have come than were expected", number);
    if (barrier.pending > 0 || barrier.bytes > 0) return;
    barrier.pending = barrier.count;
    ++barrier.phase;
}

inline void arrive(int number, int count, int bytes = 0) {
    Barrier& barrier = barriers[number];
    EMULATOR_CHECK(barrier.pending >= count, "barrier %d: an arrival too many in phase %d", number, barrier.phase);
    barrier.pending -= count;
    barrier.bytes += bytes;
    end_phase_if_complete(number);
}

// A thread that waits for a barrier must wait for each of its phases in turn, because parity alone cannot tell it which
// phase has ended.
inline void wait_for_phase(int number, uint32_t parity) {
    int& due = barriers[number].due[threadIdx.x];
    // The phase before the first counts as complete.
    if (due == NEVER_WAITED) due = parity ? -1 : 0;
    EMULATOR_CHECK(uint32_t(due & 1) == parity, "barrier %d: waits for parity %u in phase %d", number, parity, due);
    const int its_phase = due++;
    const auto has_passed = [=] {
        const int phase = barriers[number].phase;
        return uint32_t(phase & 1) != parity || phase > its_phase + 1;
    };
    if (!has_passed() || !draw(4)) wait_until(has_passed, "mbarrier", number);
    const int phase = barriers[number].phase;
    EMULATOR_CHECK(phase == its_phase + 1, "barrier %d: missed the end of phase %d, now %d", number, its_phase, phase);
}

// ---- named barriers --------------------------------------------------------------------------------------------

struct NamedBarrier {
    int arrived = 0;
    long generation = 0;
};

inline NamedBarrier named_barriers[16];

inline void arrive_at_named(int number, int threads) {
    NamedBarrier& barrier = named_barriers[number];
    if (++barrier.arrived < threads) return;
    barrier.arrived = 0;
    ++barrier.generation;
}

inline void wait_at_named(int number, int threads) {
    const NamedBarrier& barrier = named_barriers[number];
    const long generation = barrier.generation;
    arrive_at_named(number, threads);
    wait_until([&] { return barrier.generation != generation; }, "named barrier", number);
}

// ---- of a program ----------------------------------------------------------------------------------------------

inline void forget_barriers() {
    barriers.clear();
    for (auto& barrier : named_barriers) barrier = {};
}

// A program must leave no phase half complete.
inline void check_barriers_at_rest() {
    for (size_t i = 0; i < barriers.size(); ++i) {
        const Barrier& barrier = barriers[i];
        const bool at_rest = barrier.pending == barrier.count && barrier.bytes == 0;
        EMULATOR_CHECK(at_rest, "barrier %zu: %d arrivals, %ld bytes to come", i, barrier.pending, barrier.bytes);
    }
    for (int i = 0; i < 16; ++i) EMULATOR_CHECK(named_barriers[i].arrived == 0, "named barrier %d: left half full", i);
}

inline void report_barriers() {
    for (size_t i = 0; i < barriers.size(); ++i) {
        const Barrier& barrier = barriers[i];
        const char* line = "\n  barrier %zu: phase %d, %d of %d arrivals and %ld bytes to come";
        add_to_report(line, i, barrier.phase, barrier.pending, barrier.count, barrier.bytes);
    }
}

}  // namespace emulator
