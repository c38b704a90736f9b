// SPDX-License-Identifier: Apache-2.0
// What a seed decides: how long copies take, when wgmma is carried out, which warps lag behind.
#pragma once

#include <functional>
#include <queue>
#include <random>

#include "fibres.cuh"

namespace emulator {

inline std::mt19937 generator;

// A number below `limit`.
inline uint32_t draw(uint32_t limit) { return uint64_t(generator()) * limit >> 32; }

template <typename T, int COUNT>
T draw_from(const T (&values)[COUNT]) {
    return values[draw(COUNT)];
}

enum class Mma { AT_ONCE, AT_THE_WAIT, BETWEEN };

// How a program's events are timed. Each program draws its own.
struct Pace {
    Mma mma;
    bool coupled;                    // a wait for wgmma waits until all four warps have issued it
    bool parted;                     // lanes of a warp diverge wherever they may
    int latency;                     // upper bound, in turns, of what most copies take
    int sleep_chance, sleep_length;  // a warp rests one time in so many, for so many turns at most
    int lazy_warp;                   // rests every other time
    int slow_copiers;                // 64 threads whose copies all take SLOW turns longer
};
constexpr int SLOW = 2000;

inline Pace pace;

inline void draw_pace(int threads) {
    pace.mma = draw_from({Mma::AT_ONCE, Mma::AT_THE_WAIT, Mma::BETWEEN});
    pace.coupled = draw(2);
    pace.parted = draw(2);
    pace.latency = draw_from({1, 30, 400, 3000});
    pace.sleep_chance = draw_from({1'000'000, 40, 8, 3});
    pace.sleep_length = draw_from({10, 100, 1000});
    // With a chance of one half the number lies past the last warp, and none is lazy.
    pace.lazy_warp = draw(threads / 32 * 2);
    pace.slow_copiers = draw(4);
}

inline uint32_t draw_latency() {
    const int lag = int(threadIdx.x) / 64 == pace.slow_copiers ? SLOW : 0;
    return lag + 1 + draw(draw(8) ? pace.latency : 8 * pace.latency);
}

// ---- what happens later ----------------------------------------------------------------------------------------

struct Event {
    uint64_t turn;
    uint32_t order;  // among the events of a turn
    std::function<void()> act;

    bool operator<(const Event& other) const {
        return turn != other.turn ? turn > other.turn : order > other.order;
    }
};

inline std::priority_queue<Event> events;

inline void at_turn(uint64_t turn, std::function<void()> act) {
    events.push({turn, uint32_t(generator()), std::move(act)});
}

inline void run_due_events() {
    while (!events.empty() && events.top().turn <= now) {
        const auto act = events.top().act;
        events.pop();
        act();
    }
}

}  // namespace emulator
