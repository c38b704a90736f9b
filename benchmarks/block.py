# SPDX-License-Identifier: Apache-2.0
"""The method `block` in one layer: choosing and attending, beside FlashAttention-3 on the same chunk.

    python -m benchmarks.block --out benchmarks/results/h100-block.json
    python -m benchmarks.block --cache fp8 --kernel cuda triton --out benchmarks/results/h100-block-fp8.json
    python -m benchmarks.block --lists lists.npz --out benchmarks/results/h100-block-lists.json

Queries and keys are random, so the groups that are attended to are drawn, at a given density. Choosing still does all
of its work, which depends on the data only through the length of the lists: its share is set so that they are as long
as the drawn ones. With --lists, the groups that are attended to were chosen on a real prompt (benchmarks.record). They
are used as they were, and carried over to more heads and tokens.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import peers, results
from benchmarks.block_cases import LISTS, Attended, Case, drawn_cases, recorded_cases
from benchmarks.cases import Case as Shape
from benchmarks.cases import Inputs, in_fp8, make_inputs
from benchmarks.chunks import TOLERANCE
from benchmarks.lists import Lists
from benchmarks.timing import bf16_matmul_tflops, median, say
from minference_vllm import ops, reference
from minference_vllm.attention import Guard, LayerState, watch
from minference_vllm.chunk import Chunk
from minference_vllm.index import EVERY_GROUP, TILE, TileIndex
from minference_vllm.kernels import cuda
from minference_vllm.methods import Block
from minference_vllm.methods.block import COARSE_FROM, BlockSettings
from minference_vllm.methods.block_scratch import BlockScratch
from minference_vllm.ops import Kernel, choose_kernel
from minference_vllm.recall import Floors
from minference_vllm.scratch import AttendBuffers, RecallBuffers, RecallTotals, ScratchShape, num_bytes
from minference_vllm.tuning.groups import as_on_real_prompts, draw_groups

CHECKED_HEADS, CHECKED_TILES = 2, 3
DENSE_FP8_TOLERANCE = 0.5
"""FlashAttention-3 rounds probabilities to FP8. A scale that is missing or applied twice gives a larger error."""


SETTINGS = {
    "timing": "CUDA events, medians; see h100-attention.json",
    "choose_ms": "means of the keys, row normalisers, masses, selection: the whole choice; its parts beside",
    "heads_at_once": "that choose in one turn; parts are timed for all turns together",
    "max_fine": "share of boxes scored finely, which real prompts of the length have (docs/methods.md)",
    "score_dtype": "of the means and of the rows that are scored against them; `--score-dtype model fp8` compares",
    "cache": "of keys and values; with fp8 queries are FP8 too, and both kernels write bf16",
    "kernel": "that attends; `--kernel cuda triton` compares",
    "attend_ms": "drawn groups where no lists are given, the same for both halves of a tile; of one tile's groups the "
    "next keeps minference_vllm.tuning.groups.STAYS; pages of 16 in random order",
    "density": "kept / causal pairs of the chunk, as the kernel counts them; attend_tflops counts kept pairs alone",
    "guard_ms": "recall of 64 rows of every 8,192, and the look for heads below the floor, of which there are none",
    "dense_ms": "flash_attn_varlen_func of vLLM, fa_version 3, on the same pages and rows",
    "speedup": "dense_ms / (choose_ms + attend_ms + guard_ms)",
    "relative_error": "largest over some tiles and heads, against minference_vllm.reference on the same index",
    "dense_error": "the same of FlashAttention-3, on all keys; in FP8 it rounds probabilities to FP8 as well",
}


def make_chunk(case: Case, inputs: Inputs) -> Chunk:
    q = inputs.q[case.tokens - case.rows :]
    out = torch.empty_like(q, dtype=torch.bfloat16)
    return Chunk(q, out, inputs.kv, case.tokens - case.rows, inputs.scale, inputs.q_scale)


def every_group(chunk: Chunk) -> TileIndex:
    """An index under which all keys are attended to."""
    counts = torch.tensor([EVERY_GROUP, 0, 0], dtype=torch.int32, device=chunk.q.device)
    counts = counts.repeat(chunk.num_qo_heads, chunk.num_tiles, 1)
    return TileIndex(torch.zeros_like(counts), counts)


def error_of(chunk: Chunk, index: TileIndex) -> float:
    """Largest relative error of the chunk's output in a few tiles and heads."""
    errors = []
    for head in range(0, chunk.num_qo_heads, max(chunk.num_qo_heads // CHECKED_HEADS, 1)):
        of_head = chunk.of_heads(head, 1)
        for tile in range(0, chunk.num_tiles, max(chunk.num_tiles // CHECKED_TILES, 1)):
            rows = slice(tile * TILE, tile * TILE + TILE)
            q = of_head.q[rows]
            out = torch.empty_like(q, dtype=chunk.out.dtype)
            part = replace(of_head, q=q, out=out, context_len=chunk.context_len + tile * TILE)
            lists = TileIndex(*(of[head : head + 1, tile : tile + 1] for of in (index.groups, index.counts)))
            reference.attend(part, lists, AttendBuffers.allocate(1, TILE, q.device))
            errors.append(peers.difference(of_head.out[rows], part.out))
    return peers.worst(errors)


def time_parts(method: Block, chunk: Chunk, scratch: BlockScratch, share: torch.Tensor) -> dict[str, float]:
    """Milliseconds that the whole choice takes, and each of its parts."""
    ms, kernel, settings = partial(median, device=chunk.q.device), method.kernel, method.settings

    buffers = method.buffers(chunk, scratch)
    coarse, num_heads = buffers.coarse, len(buffers.masses)
    boxes = coarse and coarse.boxes
    turns = [chunk.of_heads(first, num_heads) for first in range(0, chunk.num_qo_heads, num_heads)]

    def in_turns(part: Callable[[Chunk], None]) -> float:
        def run() -> None:
            for of_heads in turns:
                part(of_heads)

        return ms(run)

    def means(of: Chunk) -> None:
        ops.key_means(of.kv, of.seq_len, buffers.means, kernel)

    def normalise(of: Chunk) -> None:
        ops.row_normalisers(of, buffers.means, buffers.row_lse, kernel)

    def masses(of: Chunk) -> None:
        ops.group_masses(of, buffers.means, buffers.row_lse, buffers.masses, kernel, boxes)

    def coarse_masses(of: Chunk) -> None:
        ops.box_masses(of, coarse.means, buffers.row_lse, coarse.masses, kernel)

    return {
        "choose_ms": ms(partial(method.choose, chunk, share, scratch)),
        "heads_at_once": num_heads,
        "means_ms": in_turns(means),
        "normalise_ms": in_turns(normalise),
        "coarse_ms": in_turns(coarse_masses) if coarse else 0.0,
        "masses_ms": in_turns(masses),
        "coarse_from": settings.coarse_from,
        "max_fine": settings.max_fine if coarse else 1.0,
        "rows_per_half": settings.rows_per_half,
        "score_dtype": str(buffers.means.dtype).removeprefix("torch."),
    }


def make_guard(chunk: Chunk, attend: AttendBuffers, method: Block) -> Callable[[], None]:
    """A call that measures the chunk's recall, with floors so low that no head is below them."""
    heads, device = chunk.num_qo_heads, chunk.q.device
    lowest = torch.finfo(torch.float32).tiny
    guard = Guard(
        Floors(lowest, lowest), RecallBuffers.allocate(heads, device), RecallTotals.allocate(1, heads, device)
    )
    layer = LayerState(0, method.budgets(heads, device), None, attend, guard)
    return partial(watch, chunk, method, layer, guard)


class Dense(NamedTuple):
    """The milliseconds of FlashAttention-3 on a chunk, and its error."""

    ms: float | None = None
    error: float | None = None


def measure(case: Case, inputs: Inputs, dense: Dense, method: Block, index: TileIndex | None = None) -> dict[str, Any]:
    """A row.

    Args:
        index: what is attended to; it is drawn if not given.

    Raises:
        SystemExit: the output is wrong.
    """
    method = as_on_real_prompts(method, case.tokens)
    device, kernel, chunk = inputs.q.device, method.kernel, make_chunk(case, inputs)
    heads = case.num_qo_heads, case.num_kv_heads, case.head_dim
    fp8 = chunk.is_quantized, chunk.is_quantized
    shape = ScratchShape(*heads, chunk.out.dtype, case.tokens, case.rows, *fp8)
    scratch = method.scratch(shape, device)
    attend = AttendBuffers.allocate(case.num_qo_heads, case.rows, device)
    index = draw_groups(chunk, method, 0, case.density) if index is None else index
    ops.attend(chunk, index, attend, kernel)
    pairs = int(attend.kept_pairs)
    error = error_of(chunk, index)
    if not (error <= TOLERANCE and chunk.out.sum().isfinite()):
        raise SystemExit(f"{case}: our output is wrong, relative error {error:.1e}")
    # If all groups of the last tile were equally heavy, its limit would drop d of them, which is to be 1 - density.
    heaviness = max(method.settings.long_from / chunk.seq_len, 1)
    kept = 1 - ((1 - case.density) ** 2 * heaviness) ** (1 / 3)
    share = torch.full((case.num_qo_heads,), max(kept, 1e-6), device=device)
    parts = time_parts(method, chunk, scratch, share)
    attend_ms = median(partial(ops.attend, chunk, index, attend, kernel), device)
    guard_ms = median(make_guard(chunk, attend, method), device)
    attends_with = Kernel.TRITON if kernel is Kernel.CUDA and not cuda.attend.supports(chunk) else kernel
    found = {
        **case._asdict(), "cache": "fp8" if chunk.is_quantized else "bf16", "kernel": attends_with.value,
        "density": pairs / (case.num_qo_heads * chunk.causal_pairs),
        "attend_ms": attend_ms, "attend_tflops": 4 * case.head_dim * pairs / attend_ms / 1e9, **parts,
        "guard_ms": guard_ms,
        "dense_ms": dense.ms, "speedup": dense.ms and dense.ms / (parts["choose_ms"] + attend_ms + guard_ms),
        "choose_of_dense": dense.ms and parts["choose_ms"] / dense.ms,
        "scratch_mib": (num_bytes(scratch) + num_bytes(attend)) / 2**20, "relative_error": error,
        "dense_error": dense.error,
    }  # fmt: skip
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in found.items()}


def measure_dense(case: Case, inputs: Inputs) -> Dense:
    """FlashAttention-3 on the chunk's rows.

    Raises:
        SystemExit: its output does not agree with the scales.
    """
    attention = peers.fa3_paged(inputs._replace(q=inputs.q[case.tokens - case.rows :]), case.tokens)
    chunk = replace(make_chunk(case, inputs), out=attention())
    error = error_of(chunk, every_group(chunk))
    if not error <= (DENSE_FP8_TOLERANCE if chunk.is_quantized else TOLERANCE):
        raise SystemExit(f"{case}: FlashAttention's output is wrong, relative error {error:.1e}")
    return Dense(median(attention, inputs.q.device), error)


def measure_all(
    options: argparse.Namespace, attended: list[Attended], methods: list[Block], device: torch.device
) -> Iterator[dict[str, Any]]:
    """The rows, each as soon as it is measured."""
    made: tuple[Any, Inputs, Dense] | None = None
    for cache, (case, named, index) in itertools.product(options.cache, attended):
        shape = (cache, case.tokens, case.rows, *case[3:])
        if made is None or made[0] != shape:
            inputs = made = None
            inputs = make_inputs(Shape(case.tokens, 1, 1, *case[3:]), device, 0)
            inputs = in_fp8(inputs) if cache == "fp8" else inputs
            made = shape, inputs, Dense() if options.tiny else measure_dense(case, inputs)
        given = replace(index, groups=index.groups.to(device), counts=index.counts.to(device)) if index else None
        for method in methods:
            yield {**named, **measure(case, made[1], made[2], method, given)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the result file")
    parser.add_argument("--tiny", action="store_true", help="smoke test on the CPU: a toy size, no FlashAttention")
    parser.add_argument(
        "--score-dtype", nargs="+", choices=["auto", "fp8", "model"], default=["auto"], help="a row for each"
    )
    parser.add_argument(
        "--coarse-from", type=int, nargs="+", default=[COARSE_FROM], help="prompt lengths, a row for each"
    )
    parser.add_argument("--cache", nargs="+", choices=["bf16", "fp8"], default=["bf16"], help="a row for each")
    parser.add_argument("--kernel", nargs="+", choices=["auto", *Kernel], default=["auto"], help="a row for each")
    parser.add_argument("--tokens", type=int, nargs="+", help="only the cases of these lengths")
    parser.add_argument("--lists", type=Path, help="attend to lists that benchmarks.record has written")
    return parser.parse_args()


def main() -> None:
    options = parse()
    results.describe_run(options.tiny)
    device = torch.device("cpu" if options.tiny else "cuda", None if options.tiny else torch.cuda.current_device())
    kernels = [choose_kernel(asked, device) for asked in options.kernel]
    methods = [
        Block(BlockSettings(score_dtype=asked, coarse_from=length), kernel)
        for kernel, asked, length in itertools.product(kernels, options.score_dtype, options.coarse_from)
    ]
    settings: dict[str, Any] = {**SETTINGS, "method": BlockSettings().model_dump()}
    settings["bf16_matmul_tflops"] = None if options.tiny else bf16_matmul_tflops(device)
    attended = drawn_cases(options.tiny)
    if options.lists:
        lists = Lists.load(options.lists)
        settings |= {"lists": LISTS, "recorded": lists.about}
        attended = recorded_cases(lists, options.tiny)
    attended = [of for of in attended if of.case.tokens in (options.tokens or [of.case.tokens])]
    rows = []
    for row in measure_all(options, attended, methods, device):
        rows.append(row)
        say(", ".join(f"{name} {value}" for name, value in row.items()))
        results.write(options.out, rows, options.tiny, settings=settings)
    print(results.table(rows))


if __name__ == "__main__":
    main()
