// SPDX-License-Identifier: Apache-2.0
// Online softmax of the attention kernel, over the rows that a thread holds of an accumulator.
//
// Probabilities are relative to a reference score. Any reference near a row's maximum gives the same result. So the
// maximum of earlier stages is used until sums of probabilities show that it is too low. That is rare after a tile's
// first stages, and most stages need not search for a maximum.
#pragma once

#include "attend_lanes.cuh"

namespace attend {

using Probabilities = uint32_t[SCORES / 8][4];  // as wgmma reads them: sixteen columns in four registers

template <typename T>
struct Softmax {
    // The reference is raised if a thread's probabilities of one stage add up to more than this, because each of them
    // must be finite in fp16.
    static constexpr float HIGHEST_SUM = 1 << 15;

    // One for each of the thread's two rows. Scaled scores are logarithms to base 2.
    float reference[2];
    float sum[2];  // over the thread's columns

    // Raise the reference to the maximum of a stage's scores. Returns the factors for the sums and outputs so far.
    template <int COUNT>
    __device__ __forceinline__ float2 raise(const float (&scores)[COUNT], float scale_log2) {
        float top[2] = {scores[0], scores[2]}, shrink[2];
#pragma unroll
        for (int i = 0; i < COUNT; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], scores[i]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float before = reference[r];
            reference[r] = fmaxf(before, row_maximum(top[r]) * scale_log2);
            shrink[r] = hopper::exp2_approx(before - reference[r]);
        }
        return {shrink[0], shrink[1]};
    }

    // Scores become probabilities relative to the reference. Returns their sums.
    template <int COUNT>
    __device__ __forceinline__ float2 soften(
        const float (&scores)[COUNT], float scale_log2, Probabilities& probabilities
    ) const {
        float added[2] = {};
        // wgmma lays out an accumulator in blocks of eight columns, and its operand A in blocks of sixteen.
#pragma unroll
        for (int i = 0; i < COUNT; i += 2) {
            float both[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                both[j] = hopper::exp2_approx(fmaf(scores[i + j], scale_log2, -reference[i / 2 % 2]));
                added[i / 2 % 2] += both[j];
            }
            probabilities[i / 8][i / 2 % 4] = hopper::pack<T>(both[0], both[1]);
        }
        // A narrow stage has half as many probabilities. Leaving out the products with these zeros would take a branch
        // between wgmmas, which costs more than the products do.
#pragma unroll
        for (int i = COUNT; i < SCORES; i += 2) probabilities[i / 8][i / 2 % 4] = 0;
        return {added[0], added[1]};
    }

    // The first stage of a tile. Every row must have a finite score in it.
    template <int COUNT>
    __device__ __forceinline__ void begin(
        const float (&scores)[COUNT], float scale_log2, Probabilities& probabilities
    ) {
        reference[0] = reference[1] = -INFINITY;
        raise(scores, scale_log2);
        const float2 added = soften(scores, scale_log2, probabilities);
        sum[0] = added.x;
        sum[1] = added.y;
    }

    // Any other stage; `acc` holds the outputs so far.
    template <int COUNT, int OUTPUTS>
    __device__ __forceinline__ void add(
        const float (&scores)[COUNT], float scale_log2, Probabilities& probabilities, float (&acc)[OUTPUTS]
    ) {
        float2 added = soften(scores, scale_log2, probabilities);
        if (__any_sync(0xFFFFFFFF, added.x > HIGHEST_SUM || added.y > HIGHEST_SUM)) {
            const float2 shrink = raise(scores, scale_log2);
            sum[0] *= shrink.x;
            sum[1] *= shrink.y;
#pragma unroll
            for (int i = 0; i < OUTPUTS; ++i) acc[i] *= i / 2 % 2 ? shrink.y : shrink.x;
            added = soften(scores, scale_log2, probabilities);
        }
        sum[0] += added.x;
        sum[1] += added.y;
    }
};

}  // namespace attend
