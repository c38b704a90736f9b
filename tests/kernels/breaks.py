# SPDX-License-Identifier: Apache-2.0
"""Statements without which the CUDA kernels that attend and probe are wrong; the keys say what happens without them."""

ATTEND_BREAKS = {
    "the halves' stages are not evened out": ("attend.cuh", "own[0] = max(own[0], own[1] - 1);"),
    "slots are released while values are added": (
        "attend_consume.cuh",
        "hopper::mma_wait<0>();\n        hopper::pin(acc);",
    ),
    "gathered keys are multiplied unfenced": ("attend_consume.cuh", "if (by_rows) hopper::fence_async_proxy();"),
    "scores are not masked": ("attend_consume.cuh", "mask(scores);"),
    "keys are copied over others in use": (
        "attend_produce.cuh",
        "hopper::wait(&shared.empty[which][slot], phase ^ 1);",
    ),
    "outputs do not follow the reference": ("attend_softmax.cuh", "acc[i] *= i / 2 % 2 ? shrink.y : shrink.x;"),
    "the halves are out of turn": ("attend_consume.cuh", "if (half == 1) consumer.pass_turn();"),
    "queries are never released": ("attend_consume.cuh", "if (--steps_left == 0) release(&shared.q_empty);"),
}
TILES_BREAKS = {
    "the longer half waits for its turn": ("attend_consume.cuh", "sit_out();\n                advance();"),
    "the slots of the longer half are not skipped": ("attend_consume.cuh", "if (half == 0 && is_others) advance();"),
    "shared stages come again": ("attend_consume.cuh", "shared_at_end = round > 0 ? shared_at_end : 0;"),
    "a tile that keeps every group keeps none": (
        "attend_index.cuh",
        "if (work.num_groups[SHARED] == EVERY_GROUP) work.num_groups[SHARED] = work.tile * GROUPS_PER_TILE;",
    ),
    "nobody arrives for the half that skips a stage": (
        "attend_produce.cuh",
        "if (thread == 0 && taken_by != SHARED) hopper::arrive(&shared.empty[which][slot], WARPS_PER_HALF);",
    ),
}
PROBE_BREAKS = {
    "keys are copied over others in use": (
        "probe_load.cuh",
        "hopper::wait(&shared.barriers->empty[ring.slot], ring.phase ^ 1);",
    ),
    "scores are read before they are there": (
        "probe_mass.cuh",
        "hopper::mma_wait<0>();\n            hopper::pin(scores[0]);",
    ),
}
FP8_BREAKS = {
    "values are converted before they are there": (
        "attend_convert.cuh",
        "hopper::wait(&shared.full[VALUES][slot][SHARED], phase);",
    ),
    "values are converted over others in use": (
        "attend_convert.cuh",
        "hopper::wait(&shared.converted_empty[slot], phase ^ 1);",
    ),
    "converted values are multiplied unfenced": ("attend_convert.cuh", "hopper::fence_async_proxy();"),
    "nobody arrives for the half that skips a stage": (
        "attend_convert.cuh",
        "if (thread == 0 && kind != SHARED) hopper::arrive(&shared.converted_empty[slot], WARPS_PER_HALF);",
    ),
    "slots of stored values are never left": ("attend_convert.cuh", "hopper::arrive(&shared.empty[VALUES][slot]);"),
    "who converts is not told of the end": ("attend_produce.cuh", "if (S::CONVERTS && which == VALUES) stream.end();"),
    "who converts is not told of private stages": ("attend_produce.cuh", "note_kind(kind);"),
}
BREAKS = [*ATTEND_BREAKS.values(), *TILES_BREAKS.values(), *PROBE_BREAKS.values(), *FP8_BREAKS.values()]
