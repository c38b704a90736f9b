// SPDX-License-Identifier: Apache-2.0
// Sizes that Hopper fixes.
#pragma once

namespace hopper {

constexpr int WARP = 32;
constexpr int WARPGROUP = 128;
// Shared memory that wgmma reads is swizzled in rows of 128 bytes; eight rows are an atom.
constexpr int SWIZZLE_BYTES = 128;
constexpr int ATOM_BYTES = 8 * SWIZZLE_BYTES;
constexpr int BOX_ELEMENTS = SWIZZLE_BYTES / 2;  // of a 16-bit type: one swizzled row

}  // namespace hopper
