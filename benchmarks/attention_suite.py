# SPDX-License-Identifier: Apache-2.0
"""Whether the backend's attention is right: batches of all kinds, over caches of all kinds, run as vLLM runs them.

    python -m benchmarks.attention_suite --out benchmarks/results/attention-suite.json

The method is that of vLLM's own tests of its attention backends (tests/v1/attention/test_attention_backends.py). vLLM's
classes make layer, metadata and cache, whose pages lie in random order. Each output is compared with exact attention in
float32, and with FlashAttention's output, run in the same way. Cache slots that no request has written hold NaN. The
exit status is 1 if a row is wrong; all rows are measured and written first.
"""

import argparse
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any

import torch

from benchmarks import SPARSE, SPARSE_BACKEND, argument_parser, resolved, results, runtime, sparse_work, vertical_slash
from benchmarks.batches import (
    BATCHES,
    KV_SCALES,
    MAX_LEN,
    MAX_ROWS,
    SHAPES,
    TINY_BATCHES,
    TINY_SHAPES,
    Batch,
    Inputs,
    Shape,
    make_inputs,
)
from benchmarks.exact import Exact, attention
from benchmarks.one_layer import OneLayer, init_worker
from benchmarks.processes import EngineProcess, serve_requests
from benchmarks.timing import say
from benchmarks.verdict import (
    DENSE_FP8_TOLERANCE,
    DENSITY_TOLERANCE,
    FP8_TOLERANCE,
    RECALL_TOLERANCE,
    TOLERANCE,
    Verdict,
)
from minference_vllm.methods.base import MAX_TOKENS

EVERYTHING, DEFAULT = "everything", "default"
OPEN_GATE = {"min_seq_len": 1, "min_chunk": 1}
# max_density 1 lets lists hold all groups, so that the lists are really made and read: a tile that wants more than its
# list holds takes all keys without one.
EVERY_GROUP = {"name": "block", "share": 1.0, "max_density": 1.0}
SETTINGS: dict[str, dict[str, Any]] = {
    f"{EVERYTHING}, block": {**OPEN_GATE, "method": EVERY_GROUP},
    f"{EVERYTHING}, vertical_slash": {**OPEN_GATE, "method": vertical_slash(MAX_TOKENS, MAX_TOKENS)},
    DEFAULT: {},
}
TINY_DEFAULT = {
    "min_seq_len": 256, "min_chunk": 16,
    "method": {"name": "block", "sink_tokens": 16, "local_tokens": 16, "max_density": 1.0},
}  # fmt: skip
QUIET = {"log_every": 0.0}

WORKERS = 4
"""Processes that share the GPU, because compiling kernels for twelve shapes takes longer than running them."""

Row = dict[str, Any]
Step = tuple[Inputs, Exact, torch.Tensor | None]
"""Inputs of a batch, its exact attention, and the output of vLLM's backend."""


def make_settings(tiny: bool) -> dict[str, dict[str, Any]]:
    """The plugin's settings by name."""
    lower = {DEFAULT: TINY_DEFAULT} if tiny else {}
    return {name: {**settings, **lower.get(name, {}), **QUIET} for name, settings in SETTINGS.items()}


def start(_: str, spec: dict[str, Any]) -> Callable[[int], list[Row]]:
    """A worker: a function from a shape's number to all rows of that shape."""
    tiny, seed = spec["tiny"], spec["seed"]
    device = torch.device("cpu") if tiny else torch.device("cuda", torch.cuda.current_device())
    init_worker(device)
    if tiny:
        return lambda number: run_shape(TINY_SHAPES[number], TINY_BATCHES, True, None, device, seed)
    return lambda number: run_shape(SHAPES[number], BATCHES, False, spec["dense_backend"], device, seed)


def run_shape(
    shape: Shape, batches: tuple[Batch, ...], tiny: bool, dense_backend: str | None, device: torch.device, seed: int
) -> list[Row]:
    """A row for each batch under each of the settings.

    Args:
        dense_backend: vLLM's backend to compare with; None on a CPU, whose backend tolerates no NaN in unused slots.
    """
    from minference_vllm import impl

    limits = MAX_ROWS, MAX_LEN
    dense = OneLayer(dense_backend, shape, limits, device) if dense_backend else None
    steps: list[Step] = []
    rows = []
    for setting, of_plugin in make_settings(tiny).items():
        impl._runtimes.clear()  # `runtime` takes the only one in this process
        ours = OneLayer(SPARSE_BACKEND, shape, limits, device, of_plugin)
        for number, batch in enumerate(batches):
            if number == len(steps):
                inputs = make_inputs(shape, batch, device, seed + number)
                exact = attention(shape, batch, inputs, ours.has_fp8_queries)
                steps.append((inputs, exact, dense.run(batch, inputs) if dense else None))
            found = measure(ours, batch, steps[number], setting != DEFAULT)
            rows.append({"batch": batch.name, **shape.row, "setting": setting, **found})
    return rows


def measure(ours: OneLayer, batch: Batch, step: Step, keeps_all: bool) -> Row:
    """Fields of a row: how far the backend's output is off, and whether that is wrong."""
    (inputs, exact, dense), before = step, sparse_work()
    out = ours.run(batch, inputs)
    if out.is_cuda:
        torch.cuda.synchronize()  # the counts of this step may still be on their way to the host
    work = sparse_work().since(before)
    lse = ours.layer.impl.layer_state.attend.lse
    config, is_fp8 = runtime().config, ours.shape.is_fp8
    return Verdict(batch, config, keeps_all, out, exact, dense, is_fp8, work, lse).row()


def run_all(options: argparse.Namespace, num_shapes: int, write: Callable[[list[Row]], None]) -> list[Row]:
    """The rows of all shapes, in order. They are written after each shape: a run that is cut off keeps its rows."""
    waiting: SimpleQueue[int] = SimpleQueue()
    for number in range(num_shapes):
        waiting.put(number)
    found: dict[int, list[Row]] = {}
    writing = threading.Lock()

    def work(_: int) -> None:
        spec = {"tiny": options.tiny, "seed": options.seed, "dense_backend": options.dense_backend}
        with EngineProcess("benchmarks.attention_suite", SPARSE, spec) as engine:
            while True:
                try:
                    number = waiting.get_nowait()
                except Empty:
                    return
                rows = engine.ask(number)
                with writing:
                    found[number] = rows
                    report(rows)
                    write([row for _, of_shape in sorted(found.items()) for row in of_shape])

    workers = min(options.workers, num_shapes)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, range(workers)))  # an engine that fails stops the benchmark here
    return [row for _, of_shape in sorted(found.items()) for row in of_shape]


def report(rows: list[Row]) -> None:
    """Progress: one line a shape, and one for each row that is wrong."""
    first, wrong = rows[0], [row for row in rows if not row["ok"]]
    say(
        f"{first['heads']} heads of {first['head_dim']}, {first['dtype']}, cache {first['cache']} {first['layout']} in "
        f"pages of {first['page_size']}: {len(rows) - len(wrong)} of {len(rows)} rows are right"
    )
    for row in wrong:
        say(f"    WRONG: {row['batch']}, {row['setting']}: {row['fault']}")


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a result file."""
    return {
        "exact": "attention in float32 in plain torch, to the numbers that the cache stands for",
        "max_abs": "largest difference from exact attention",
        "max_rel": "largest difference of a row of a head from exact attention, by norm, as a share of the row's norm",
        "dense_max_abs, dense_max_rel": "the same of the dense backend, which runs the same batch over a cache of its "
        "own; max_from_dense: of ours from its",
        "density": "of what ran sparse: kept / causal pairs; those of heads that the guard has redone count twice",
        "redone": "share of heads that the guard had attend to all keys",
        "recall": "attention on kept keys, mean over all rows and heads of the last sparse chunk, redone ones included",
        "ok": f"within {TOLERANCE} absolute plus {TOLERANCE} relative of exact attention. Over a cache in FP8: within "
        f"{FP8_TOLERANCE}, and rows that run dense within {DENSE_FP8_TOLERANCE} of the dense backend's. Settings that "
        f"keep everything: density 1 within {DENSITY_TOLERANCE}, recall 1 within {RECALL_TOLERANCE}. Default settings: "
        "sparse rows may move as far as the attention that they leave out could move them, and recall is at least "
        "recall_floor. As many rows as pass the gate run sparse",
        "batches": {
            batch.name: [f"{request.rows} of {request.seq_len}" for request in batch.requests]
            for batch in (TINY_BATCHES if options.tiny else BATCHES)
        },
        "fp8_scales": KV_SCALES,
        "limits": {"max_num_batched_tokens": MAX_ROWS, "max_model_len": MAX_LEN},
        "dense": None if options.tiny else {"attention_backend": options.dense_backend},
        "sparse": {name: resolved(settings) for name, settings in make_settings(options.tiny).items()},
    }


def main() -> None:
    if serve_requests(start):
        return
    parser = argument_parser(__doc__, "two toy shapes, short batches, the gate at 256 tokens, no dense backend")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes that share the GPU")
    options = parser.parse_args()
    results.describe_run(options.tiny)
    settings = describe(options)
    shapes = TINY_SHAPES if options.tiny else SHAPES
    rows = run_all(options, len(shapes), lambda rows: results.write(options.out, rows, options.tiny, settings=settings))
    wrong = Counter(row["setting"] for row in rows if not row["ok"])
    say(f"{len(rows) - wrong.total()} of {len(rows)} rows are right")
    if wrong:
        sys.exit(f"{wrong.total()} rows are wrong ({dict(wrong)}): see `fault` in {options.out}")


if __name__ == "__main__":
    main()
