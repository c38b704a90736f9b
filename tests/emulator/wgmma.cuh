// SPDX-License-Identifier: Apache-2.0
// wgmma, for each warp by itself. A product is carried out some time after it was issued, at the latest when it is
// waited for.
#pragma once

#include <immintrin.h>

#include "warps.cuh"

namespace emulator {

constexpr int MAX_DEPTH = 32;  // summed over by one wgmma
constexpr int WARPS_A_GROUP = 4;
constexpr int ROWS = 16;  // of a warp
constexpr int MAX_COLUMNS = 128;

// ---- numbers ---------------------------------------------------------------------------------------------------

// E4M3: sign, 4 bits of exponent, 3 of mantissa; no infinity, and NaN where all of them are set.
inline float widen_e4m3(uint8_t bits) {
    const int exponent = bits >> 3 & 0xF, mantissa = bits & 7;
    const float size = exponent == 0 ? ldexpf(mantissa, -9) : ldexpf(8 + mantissa, exponent - 10);
    return copysignf((bits & 0x7F) == 0x7F ? NAN : size, bits & 0x80 ? -1.0f : 1.0f);
}

// To the nearest, ties to even, at most the largest number.
inline uint8_t narrow_e4m3(float x) {
    constexpr float LARGEST = 448;
    const uint8_t sign = std::signbit(x) ? 0x80 : 0;
    if (std::isnan(x)) return sign | 0x7F;
    const float size = min(fabsf(x), LARGEST);
    int exponent = size < 0x1p-6f ? -6 : ilogbf(size);
    // The size in units of its last place: from 8 on for normal numbers, less than 8 for subnormal ones.
    const int places = int(nearbyintf(ldexpf(size, 3 - exponent)));
    return sign | (places + (exponent + 6) * 8);
}

inline float widen(uint16_t bits, hopper::Element element) {
    if (element == hopper::Element::E4M3) return widen_e4m3(bits);
    if (element == hopper::Element::FP16) return _cvtsh_ss(bits);
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

// To the nearest, ties to even.
inline uint16_t narrow(float x, bool is_bf16) {
    if (!is_bf16) return _cvtss_sh(x, 0);
    if (std::isnan(x)) return 0x7FFF;
    const uint32_t bits = __float_as_uint(x);
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

// ---- operands --------------------------------------------------------------------------------------------------

struct Matrix {
    uint32_t start, leading, stride;  // bytes
    int row_bytes;                    // that are swizzled

    explicit Matrix(uint64_t descriptor)
        : start(field(descriptor, 0)),
          leading(field(descriptor, 16)),
          stride(field(descriptor, 32)),
          row_bytes(256 >> (descriptor >> 62)) {}

    static uint32_t field(uint64_t descriptor, int bit) { return uint32_t(descriptor >> bit & 0x3FFF) << 4; }

    uint32_t place(uint32_t offset) const { return swizzle(start + offset, row_bytes); }

    // 16 bytes of a matrix that is contiguous along the dimension summed over.
    uint32_t along_depth(int row, int byte) const { return place(row / 8 * stride + row % 8 * row_bytes + byte); }

    // Eight 16-bit elements of a matrix that is contiguous along the other dimension.
    uint32_t along_columns(int k, int column) const {
        return place(column / 64 * leading + k / 8 * stride + k % 8 * row_bytes + column % 64 * 2);
    }
};

// Reads 16 bytes of a matrix as floats.
inline void read_piece(uint32_t address, const Product& product, float* elements) {
    const uint64_t written = writing_turn(address);
    const bool is_visible = written == 0 || written < product.fenced;
    EMULATOR_CHECK(is_visible, "wgmma reads what a thread or cp.async wrote to %u, with no proxy fence between", address);
    const char* piece = locate(address);
    const int bytes = hopper::bytes_of(product.element);
    for (int i = 0; i < PIECE / bytes; ++i) {
        uint16_t bits = 0;
        memcpy(&bits, piece + i * bytes, bytes);
        elements[i] = widen(bits, product.element);
    }
}

// Reads the elements of a row that one product sums over, from a matrix that is contiguous along them.
inline void read_along_depth(const Matrix& matrix, int row, const Product& product, float* elements) {
    const int each = PIECE / hopper::bytes_of(product.element);
    for (int i = 0; i < hopper::MMA_BYTES / PIECE; ++i) {
        read_piece(matrix.along_depth(row, i * PIECE), product, elements + i * each);
    }
}

inline void read_a(const Product& product, int warp_in_group, float (&a)[ROWS][MAX_DEPTH]) {
    if (product.from_registers) {
        // Lane l holds elements of the rows l / 4 and l / 4 + 8: two neighbours per register, in blocks of 8 columns.
        for (int l = 0; l < LANES; ++l) {
            for (int i = 0; i < 8; ++i) {
                const uint16_t bits = product.a_registers[l][i / 2] >> 16 * (i % 2);
                a[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i / 4 * 8 + i % 2] = widen(bits, product.element);
            }
        }
        return;
    }
    const Matrix matrix(product.a);
    for (int row = 0; row < ROWS; ++row) read_along_depth(matrix, warp_in_group * ROWS + row, product, a[row]);
}

inline void read_b(const Product& product, float (&b)[MAX_DEPTH][MAX_COLUMNS]) {
    const Matrix matrix(product.b);
    if (product.from_registers) {
        for (int k = 0; k < product.depth(); ++k) {
            for (int column = 0; column < product.columns; column += 8) {
                read_piece(matrix.along_columns(k, column), product, &b[k][column]);
            }
        }
        return;
    }
    for (int column = 0; column < product.columns; ++column) {
        float elements[MAX_DEPTH];
        read_along_depth(matrix, column, product, elements);
        for (int k = 0; k < product.depth(); ++k) b[k][column] = elements[k];
    }
}

// ---- issue, carry out, wait ------------------------------------------------------------------------------------

// Carries out the warp's oldest product, which all of its lanes have issued.
inline void carry_out_next(Warp& warp) {
    const Product& product = warp.products.front();
    const int warp_in_group = int(&warp - warps.data()) % WARPS_A_GROUP;
    float a[ROWS][MAX_DEPTH], b[MAX_DEPTH][MAX_COLUMNS];
    read_a(product, warp_in_group, a);
    read_b(product, b);
    for (int row = 0; row < ROWS; ++row) {
        float sums[MAX_COLUMNS] = {};
        for (int k = 0; k < product.depth(); ++k) {
            for (int column = 0; column < MAX_COLUMNS; ++column) sums[column] += a[row][k] * b[k][column];
        }
        for (int column = 0; column < product.columns; ++column) {
            // Which lane and register hold an element: see csrc/attend_lanes.cuh.
            void* registers = product.accumulators[row % 8 * 4 + column % 8 / 2];
            const int place = column / 8 * 4 + row / 8 * 2 + column % 2;
            if (product.in_fp16) {
                uint16_t& d = static_cast<uint16_t*>(registers)[place];
                d = narrow((product.accumulate ? _cvtsh_ss(d) : 0) + sums[column], false);
            } else {
                float& d = static_cast<float*>(registers)[place];
                d = (product.accumulate ? d : 0) + sums[column];
            }
        }
    }
    warp.products.pop_front();
    ++warp.carried_out;
}

inline bool can_carry_out(const Warp& warp) { return !warp.products.empty() && warp.products.front().is_issued(); }

inline void issue(const Product& wanted, void* accumulators, const uint32_t* a_registers) {
    Warp& warp = own_warp();
    const size_t place = warp.issued[lane()]++ - warp.carried_out;
    if (place == warp.products.size()) warp.products.push_back(wanted);
    Product& product = warp.products[place];
    const bool is_same = product.a == wanted.a && product.b == wanted.b && product.columns == wanted.columns &&
                         product.accumulate == wanted.accumulate && product.from_registers == wanted.from_registers;
    EMULATOR_CHECK(is_same, "lanes of a warp issue different wgmma");
    product.accumulators[lane()] = accumulators;
    product.a_registers[lane()] = a_registers;
    if (++product.lanes < LANES) return;
    product.fenced = warp.fenced;
    while (pace.mma == Mma::AT_ONCE && can_carry_out(warp)) carry_out_next(warp);
}

inline void commit() { own_warp().committed[lane()].push_back(own_warp().issued[lane()]); }

inline void wait_for_products(int pending) {
    meet("wait for wgmma");
    Warp& warp = own_warp();
    auto& committed = warp.committed[lane()];
    if (int(committed.size()) <= pending) return;
    const long target = committed[committed.size() - 1 - pending];
    const int first_warp = threadIdx.x / (WARPS_A_GROUP * LANES) * WARPS_A_GROUP;
    const auto all_issued = [=] {
        for (int i = 0; i < WARPS_A_GROUP; ++i) {
            if (warps[first_warp + i].issued[0] < target) return false;
        }
        return true;
    };
    if (pace.coupled) wait_until(all_issued, "wgmma of the group's other warps");
    while (warp.carried_out < target) carry_out_next(warp);
    committed.erase(committed.begin(), committed.end() - pending);
}

// Products that have been issued are carried out between the turns of threads.
inline void carry_out_some() {
    if (pace.mma != Mma::BETWEEN || draw(6)) return;
    Warp& warp = warps[draw(warps.size())];
    for (int count = 1 + draw(6); count > 0 && can_carry_out(warp); --count) carry_out_next(warp);
}

}  // namespace emulator
