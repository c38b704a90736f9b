// SPDX-License-Identifier: Apache-2.0
// The threads of one program (thread block) as fibres: each runs until it waits, and says what for.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <vector>

#include "cuda.cuh"

namespace emulator {

constexpr int NONE = -1;
constexpr int STACK_BYTES = 1 << 16;

struct Fibre {
    void* stack_pointer;
    std::vector<char> stack;
    bool done;
    bool (*is_ready)(void* condition);  // null if the fibre waits for nothing
    void* condition;
    const char* waits_at;
    int waits_for;  // which barrier
};

inline std::vector<Fibre> fibres;
inline int current = NONE;  // the fibre that runs; NONE: the scheduler
inline void* scheduler_stack_pointer;
inline void (*thread_body)();
inline uint64_t now;  // turns of the scheduler

// ---- failures --------------------------------------------------------------------------------------------------

struct Failure {};

inline bool failed;
inline char report[8192];

inline void add_to_report(const char* format, ...) {
    const size_t length = strlen(report);
    va_list values;
    va_start(values, format);
    vsnprintf(report + length, sizeof report - length, format, values);
    va_end(values);
}

// Saves the callee-saved registers on this stack, and resumes the other stack where it was left.
[[gnu::naked, gnu::noinline]] static void swap_stacks(void** save, void* load) {
    asm("push %rbp\n"
        "push %rbx\n"
        "push %r12\n"
        "push %r13\n"
        "push %r14\n"
        "push %r15\n"
        "mov %rsp, (%rdi)\n"
        "mov %rsi, %rsp\n"
        "pop %r15\n"
        "pop %r14\n"
        "pop %r13\n"
        "pop %r12\n"
        "pop %rbx\n"
        "pop %rbp\n"
        "ret\n");
}
constexpr int SAVED_REGISTERS = 6;

[[gnu::noinline]] inline void leave_fibre() { swap_stacks(&fibres[current].stack_pointer, scheduler_stack_pointer); }

// Ends the program: a fibre that failed is never resumed.
template <typename... Values>
[[gnu::noinline]] void fail(const char* format, Values... values) {
    if (current != NONE) add_to_report("thread %d: ", current);
    add_to_report(format, values...);
    failed = true;
    if (current == NONE) throw Failure{};
    leave_fibre();
}

// ---- waiting ---------------------------------------------------------------------------------------------------

inline bool can_run(const Fibre& fibre) {
    return !fibre.done && (fibre.is_ready == nullptr || fibre.is_ready(fibre.condition));
}

template <typename Condition>
[[gnu::noinline]] void wait_until(Condition condition, const char* where, int barrier = NONE) {
    Fibre& fibre = fibres[current];
    fibre.condition = &condition;
    fibre.is_ready = [](void* condition) { return (*static_cast<Condition*>(condition))(); };
    fibre.waits_at = where;
    fibre.waits_for = barrier;
    do {
        leave_fibre();
    } while (!condition());
    fibre.is_ready = nullptr;
}

inline void run_thread() {
    thread_body();
    fibres[current].done = true;
    leave_fibre();
}

inline void start_fibres(int threads) {
    fibres.resize(threads);
    for (Fibre& fibre : fibres) {
        fibre.stack.resize(STACK_BYTES);
        fibre.done = false;
        fibre.is_ready = nullptr;
        fibre.waits_at = "its start";
        fibre.waits_for = NONE;
        // The stack looks as swap_stacks would leave it, with run_thread as the return address, and is aligned as after
        // a call.
        const auto end = reinterpret_cast<uintptr_t>(fibre.stack.data() + STACK_BYTES) & ~uintptr_t(63);
        auto** top = reinterpret_cast<void**>(end) - 8;
        *top = reinterpret_cast<void*>(&run_thread);
        fibre.stack_pointer = top - SAVED_REGISTERS;
    }
}

inline void run_fibre(int thread) {
    current = threadIdx.x = thread;
    swap_stacks(&scheduler_stack_pointer, fibres[thread].stack_pointer);
    current = NONE;
    if (failed) throw Failure{};
}

}  // namespace emulator

#define EMULATOR_CHECK(condition, ...) \
    do {                               \
        if (!(condition)) emulator::fail(__VA_ARGS__); \
    } while (0)
