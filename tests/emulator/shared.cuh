// SPDX-License-Identifier: Apache-2.0
// Shared memory of a program, and its 32-bit addresses.
#pragma once

#include "chance.cuh"

namespace emulator {

constexpr int MAX_SHARED_BYTES = 227 * 1024;
// As little aligned as a kernel may count on.
constexpr int MISALIGNED = 16;
constexpr uint32_t FIRST_ADDRESS = 1024 + MISALIGNED;
constexpr int PIECE = 16;  // bytes of one asynchronous copy

alignas(1024) inline char shared_storage[MAX_SHARED_BYTES + 1024];
inline char* const shared_memory = shared_storage + MISALIGNED;
inline int shared_bytes;
// The turn in which cp.async wrote a piece, 0 if it did not.
inline uint64_t written_by_threads[MAX_SHARED_BYTES / PIECE];

inline uint32_t address_of(const void* pointer) {
    return uint32_t(static_cast<const char*>(pointer) - shared_memory) + FIRST_ADDRESS;
}

inline uint32_t offset_of(uint32_t address) {
    const uint32_t offset = address - FIRST_ADDRESS;
    EMULATOR_CHECK(address >= FIRST_ADDRESS && int(offset) + PIECE <= shared_bytes, "shared address %u", address);
    return offset;
}

inline char* locate(uint32_t address) { return shared_memory + offset_of(address); }

inline uint64_t& writing_turn(uint32_t address) { return written_by_threads[offset_of(address) / PIECE]; }

// Swizzling by 128 bytes: a piece's place in its row changes with the row.
inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// What nobody has written is NaN.
inline void fill_with_nan(uint32_t address) { memset(locate(address), 0xFF, PIECE); }

inline void clear_shared_memory(int bytes) {
    shared_bytes = bytes;
    memset(shared_storage, 0xFF, sizeof shared_storage);
    memset(written_by_threads, 0, sizeof written_by_threads);
}

}  // namespace emulator
