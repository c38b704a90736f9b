// SPDX-License-Identifier: Apache-2.0
// Sizes that Hopper fixes, and types of numbers.
#pragma once

#include <cstdint>

namespace hopper {

constexpr int WARP = 32;
constexpr int WARPGROUP = 128;
// Shared memory that wgmma reads is swizzled in rows of 128 bytes, or of 64 where no more are contiguous; eight rows are
// an atom.
constexpr int SWIZZLE_BYTES = 128;
constexpr int ATOM_BYTES = 8 * SWIZZLE_BYTES;
constexpr int BOX_ELEMENTS = SWIZZLE_BYTES / 2;  // of a 16-bit type: one swizzled row
constexpr int MMA_BYTES = 32;                    // of a row, that one wgmma sums over

// FP8 of 4 exponent and 3 mantissa bits.
struct E4M3 {
    unsigned char bits;
};

enum class Element { FP16, BF16, E4M3 };

inline Element sixteen_bits(bool is_bf16) { return is_bf16 ? Element::BF16 : Element::FP16; }
constexpr int bytes_of(Element element) { return element == Element::E4M3 ? 1 : 2; }

// Elements in a row of a box, if rows of `length` elements are copied.
constexpr uint32_t box_elements(Element element, int length) {
    const int most = SWIZZLE_BYTES / bytes_of(element);
    return length < most ? length : most;
}

}  // namespace hopper
