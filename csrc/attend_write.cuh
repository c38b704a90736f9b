// SPDX-License-Identifier: Apache-2.0
// The attention kernel's output: normalised rows and their log-sum-exp over keys.
#pragma once

#include "attend.cuh"
#include "attend_lanes.cuh"
#include "attend_softmax.cuh"

namespace attend {

// A head's sink as a logarithm to base 2, like scaled scores. Without sinks it is minus infinity, which adds nothing.
template <typename T>
__device__ __forceinline__ float sink_log2(const Params& p, int head) {
    if (p.sinks == nullptr) return -INFINITY;
    const float sink = p.sinks_are_fp32 ? __ldg(static_cast<const float*>(p.sinks) + head)
                                        : hopper::unpack<T>(__ldg(static_cast<const uint16_t*>(p.sinks) + head)).x;
    return sink * (1.f / LN_2);
}

// Rows are stored in pieces of 16 bytes. Each of a row's four lanes holds 4 bytes of a piece, so they exchange these
// until each lane has whole pieces.
//   first_row: the first of the thread's two rows, counted from the tile's first.
//   scale: of the values.
template <typename T, int HEAD_DIM, int OUTPUTS, typename S>
__device__ __forceinline__ void write(
    const Params& p, const Work& work, int lane, int first_row, const float (&acc)[OUTPUTS], const Softmax<S>& softmax,
    float scale
) {
    const float sink = sink_log2<T>(p, work.head);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float total = row_total(softmax.sum[r]);
        // A sink has no value. All it does is take its share of the row's attention away from the keys. If it takes
        // all, the exponential is infinite and the row becomes zero.
        const float factor = scale / (total + hopper::exp2_approx(sink - softmax.reference[r]));
        const int in_chunk = work.start_row() + first_row + r * 8 - p.context_len;
        const bool is_in_chunk = in_chunk >= 0 && in_chunk < p.num_rows;
        T* out = static_cast<T*>(p.out) + in_chunk * p.stride_out_row + work.head * p.stride_out_head;
#pragma unroll
        for (int first = 0; first < HEAD_DIM / 8; first += 4) {
            uint32_t piece[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* both = &acc[4 * (first + i) + 2 * r];
                piece[i] = hopper::pack<T>(both[0] * factor, both[1] * factor);
            }
            transpose_in_quad(lane, piece);
            if (is_in_chunk) {
                auto* target = reinterpret_cast<uint4*>(out + (first + lane % 4) * 8);
                *target = make_uint4(piece[0], piece[1], piece[2], piece[3]);
            }
        }
        if (is_in_chunk && lane % 4 == 0) {
            p.lse[work.head * p.stride_lse + in_chunk] = (softmax.reference[r] + log2f(total)) * LN_2;
        }
    }
}

}  // namespace attend
