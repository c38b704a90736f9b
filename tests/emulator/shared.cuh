// SPDX-License-Identifier: Apache-2.0
// Shared memory of a program, and its 32-bit addresses.
#pragma once

#include "chance.cuh"

namespace emulator {

constexpr int MAX_SHARED_BYTES = 227 * 1024;
// A kernel may count on no better alignment of its dynamic shared memory.
constexpr int MISALIGNED = 16;
constexpr uint32_t FIRST_ADDRESS = 1024 + MISALIGNED;
constexpr int PIECE = 16;  // bytes of one asynchronous copy

alignas(1024) inline char shared_storage[MAX_SHARED_BYTES + 1024];
inline char* const shared_memory = shared_storage + MISALIGNED;
inline int shared_bytes;
// For each piece the turn in which cp.async or a thread wrote it; 0 if wgmma may read it without a fence, because the
// bulk copy engine wrote it or the thread that wrote it has fenced since.
inline uint64_t written_by_threads[MAX_SHARED_BYTES / PIECE];
// For each thread the pieces that it has stored since its last fence.
inline std::vector<std::vector<uint32_t>> unfenced;

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

// Swizzling in rows of 128 or 64 bytes: a piece's place in its row changes every 128 bytes.
inline uint32_t swizzle(uint32_t address, int row_bytes) {
    return address ^ (address >> 7 & (row_bytes / PIECE - 1)) << 4;
}

// What nobody has written is NaN, in every element type, so that a kernel that reads it gives wrong results.
inline void fill_with_nan(uint32_t address) { memset(locate(address), 0xFF, PIECE); }

inline void load_piece(uint32_t address, void* target) {
    EMULATOR_CHECK(address % PIECE == 0, "load of 16 bytes from %u, which is not aligned", address);
    memcpy(target, locate(address), PIECE);
}

// The bulk copy engine and wgmma see the piece only after a fence of this thread.
inline void store_piece(uint32_t address, const void* source) {
    EMULATOR_CHECK(address % PIECE == 0, "store of 16 bytes to %u, which is not aligned", address);
    memcpy(locate(address), source, PIECE);
    writing_turn(address) = now;
    unfenced[threadIdx.x].push_back(address);
}

inline void fence_own_stores() {
    for (const uint32_t address : unfenced[threadIdx.x]) writing_turn(address) = 0;
    unfenced[threadIdx.x].clear();
}

inline void clear_shared_memory(int threads, int bytes) {
    shared_bytes = bytes;
    unfenced.assign(threads, {});
    memset(shared_storage, 0xFF, sizeof shared_storage);
    memset(written_by_threads, 0, sizeof written_by_threads);
}

}  // namespace emulator
