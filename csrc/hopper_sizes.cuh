// SPDX-License-Identifier: Apache-2.0
// Sizes that the Hopper architecture fixes, and the element types of matrices.
#pragma once

#include <cstdint>

namespace hopper {

constexpr int WARP = 32;
constexpr int WARPGROUP = 128;
// wgmma reads matrices from shared memory that is swizzled in rows of 128 bytes, or of 64 bytes if a row of the matrix
// has no more. Eight rows make a swizzle atom.
constexpr int SWIZZLE_BYTES = 128;
constexpr int ATOM_BYTES = 8 * SWIZZLE_BYTES;
constexpr int BOX_ELEMENTS = SWIZZLE_BYTES / 2;  // of a 16-bit type: one swizzled row
constexpr int MMA_BYTES = 32;                    // of a row: what one wgmma sums over (its K)

// FP8 with 4 exponent bits and 3 mantissa bits.
struct E4M3 {
    unsigned char bits;
};

enum class Element { FP16, BF16, E4M3 };

inline Element sixteen_bits(bool is_bf16) { return is_bf16 ? Element::BF16 : Element::FP16; }
constexpr int bytes_of(Element element) { return element == Element::E4M3 ? 1 : 2; }

// Elements per row of the boxes that copy rows of `length` elements: a box is at most one swizzled row wide.
constexpr uint32_t box_elements(Element element, int length) {
    const int most = SWIZZLE_BYTES / bytes_of(element);
    return length < most ? length : most;
}

}  // namespace hopper
