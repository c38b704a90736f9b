// SPDX-License-Identifier: Apache-2.0
// Runs a grid, one program after another; within a program warps take turns in an order that the seed gives.
#pragma once

#include "copies.cuh"
#include "wgmma.cuh"

namespace emulator {

inline std::vector<int> order;  // of the warps, shuffled each turn

inline bool is_asleep(const Warp& warp) { return warp.asleep_until > now; }

// Runs the lanes that can go on. Returns whether any could, even if it was held back to make the warp diverge.
inline bool run_warp(int warp) {
    const int first = draw(LANES), step = draw_from({1, LANES - 1});
    bool any = false;
    for (int i = 0; i < LANES; ++i) {
        const int thread = warp * LANES + (first + step * i) % LANES;
        if (!can_run(fibres[thread])) continue;
        any = true;
        if (pace.parted && !draw(3)) continue;
        run_fibre(thread);
    }
    const bool rests = any && !draw(warp == pace.lazy_warp ? 2 : pace.sleep_chance);
    if (rests) warps[warp].asleep_until = now + 1 + draw(pace.sleep_length);
    return any;
}

inline bool run_some_warps() {
    std::shuffle(order.begin(), order.end(), generator);
    bool any = false;
    for (const int warp : order) {
        if (is_asleep(warps[warp]) || !run_warp(warp)) continue;
        any = true;
        if (draw(2)) break;
    }
    return any;
}

inline void report_deadlock() {
    add_to_report("deadlock in turn %lu", now);
    for (size_t i = 0; i < fibres.size(); ++i) {
        const Fibre &fibre = fibres[i], &before = fibres[i - (i % LANES > 0)];
        const bool is_alike = fibre.done == before.done && fibre.waits_at == before.waits_at;
        if (i % LANES > 0 && is_alike && fibre.waits_for == before.waits_for) continue;
        const char* where = fibre.done ? "done" : fibre.waits_at;
        add_to_report("\n  thread %zu and what follows: %s %d", i, where, fibre.waits_for);
    }
    report_barriers();
    failed = true;
    throw Failure{};
}

// Nothing can run until the next copy lands or a warp wakes, so the turns until then are skipped.
inline void skip_idle_turns() {
    uint64_t next = events.empty() ? UINT64_MAX : events.top().turn;
    for (const Warp& warp : warps) {
        if (is_asleep(warp)) next = min(next, warp.asleep_until);
    }
    if (next == UINT64_MAX) report_deadlock();
    now = max(now, next - 1);
}

inline bool all_done() {
    return std::all_of(fibres.begin(), fibres.end(), [](const Fibre& fibre) { return fibre.done; });
}

inline void start_program(int threads, int bytes) {
    clear_shared_memory(threads, bytes);
    start_fibres(threads);
    warps.assign(threads / LANES, {});
    order.resize(warps.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    forget_barriers();
    last_landing.assign(threads, 0);
    events = {};
    now = 1;
    draw_pace(threads);
}

inline void run_program(int threads, int bytes) {
    start_program(threads, bytes);
    while (!all_done()) {
        ++now;
        run_due_events();
        carry_out_some();
        if (!run_some_warps()) skip_idle_turns();
    }
    EMULATOR_CHECK(events.empty(), "%zu copies or arrivals under way at the end", events.size());
    for (const Warp& warp : warps) EMULATOR_CHECK(warp.products.empty(), "wgmma that is never waited for");
    check_barriers_at_rest();
}

//   kernel: what each thread runs, bound to its arguments.
template <typename Kernel>
void launch(int programs, int threads, int bytes, Kernel kernel) {
    static const Kernel* bound;
    bound = &kernel;
    thread_body = [] { (*bound)(); };
    gridDim.x = programs;
    try {
        for (blockIdx.x = 0; !failed && blockIdx.x < programs; ++blockIdx.x) run_program(threads, bytes);
    } catch (const Failure&) {
        current = NONE;
        add_to_report(
            "\n  program %d: wgmma %d, coupled %d, parted %d, latency %d, sleep 1 in %d for %d, lazy warp %d, slow %d",
            blockIdx.x, int(pace.mma), pace.coupled, pace.parted, pace.latency, pace.sleep_chance, pace.sleep_length,
            pace.lazy_warp, pace.slow_copiers
        );
    }
}

}  // namespace emulator
