# SPDX-License-Identifier: Apache-2.0
"""Whether the plugin with its default settings is ever slower than vLLM alone, on short and long prompts, in small and
large chunks, one at a time and many at once.

    python -m benchmarks.never_slower --out benchmarks/results/never-slower.json

The shape is that of Llama-3.1-8B with made-up weights and few layers. Both engines run side by side, and answer the
same prompts in turns. The keys that are attended to sparsely are drawn, with the density of real prompts. The exit
status is 1 if a cell's whole 95% interval of the speed-up is below 0.98, or if the interval is so wide that nothing is
known. All cells are measured and written first, which takes about ten minutes, or twenty if all leave a doubt. The
longest cells get too few rounds to be judged, unless these look slow. A cell that should run sparse and does not ends
the benchmark at once. In parts that are then merged:

    python -m benchmarks.never_slower --cells '1024/*' '2048/*' --out a.json
    python -m benchmarks.never_slower --cells '8192/*' '16384/*' --out b.json
    python -m benchmarks.never_slower --merge a.json b.json --out benchmarks/results/never-slower.json
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import (
    DENSE,
    SPARSE,
    SPARSE_BACKEND,
    argument_parser,
    load_engine,
    resolved,
    results,
    runtime,
    sparse_work,
)
from benchmarks.cells import Cell, make_cells
from benchmarks.made_up import LLAMA_8B, TINY, write_model
from benchmarks.processes import EngineProcess, serve_requests
from benchmarks.rounds import NO_LIMITS, ORDER, ROUNDS, Limits, Rounds, judge
from benchmarks.synthetic import GUARD, LOWEST_FLOORS, make_chooser
from benchmarks.timing import say
from benchmarks.ttft import MEMORY_OF_EACH, TINY_SETTINGS, WORK
from minference_vllm.config import MInferenceConfig

LIMITS = Limits()
LAYERS, TINY_LAYERS = 8, 2
TINY_SECONDS = 0.1
TINY_MEMORY = 0.1  # of the machine's, for each of two engines

LONG_SECONDS = 60.0
"""A cell is long if the rounds that a judgement needs would take longer than this: an H100 takes four seconds for 32 x
16384 tokens, and reads them four times a round."""

Row = dict[str, Any]


def start(kind: str, spec: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """An engine, as a function that times a request of it: some prompts of the same length, all at once."""
    from vllm import SamplingParams

    llm = load_engine(kind, spec)
    if kind == SPARSE:
        runtime().chooser = make_chooser(spec["seed"])
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        lots = np.random.default_rng(spec["seed"]).integers(
            10, spec["vocab_size"], (request["prompts"], request["tokens"])
        )
        prompts = [{"prompt_token_ids": tokens} for tokens in lots.tolist()]
        before = sparse_work() if kind == SPARSE else None
        begin = time.perf_counter()
        llm.generate(prompts, one, use_tqdm=False)
        seconds = time.perf_counter() - begin
        if before is None:
            return {"seconds": seconds}
        work = sparse_work().since(before)
        return {"seconds": seconds, **{name: getattr(work, name) for name in WORK}}

    return answer


def time_cell(
    cell: Cell, dense: EngineProcess, sparse: EngineProcess, config: MInferenceConfig, long: float, limits: Limits
) -> Row:
    """A row, from rounds in which both engines read the same prompts, after each has read them once to warm up.

    Args:
        long: the most seconds that a judgement may take, see Rounds.time.

    Raises:
        SystemExit: nothing ran sparse where the gate is open, so two dense engines would be compared.
    """
    request = {"tokens": cell.length, "prompts": cell.prompts}

    def read(engine: EngineProcess) -> dict[str, Any]:
        answer: dict[str, Any] = engine.ask(request)
        if engine is sparse and cell.goes_sparse(config) and not answer["sparse_tokens"]:
            raise SystemExit(f"{cell}: nothing ran sparse, and its prompts pass the gate: the log above says why.")
        return answer

    read(dense)
    found, engines, rounds = read(sparse), {DENSE: dense, SPARSE: sparse}, Rounds()
    rounds.time(lambda kind: float(read(engines[kind])["seconds"]), long, limits)
    low, high = rounds.interval or (None, None)
    return {
        **cell._asdict(),
        "dense_s": round(statistics.median(rounds.seconds[DENSE]), 5),
        "sparse_s": round(statistics.median(rounds.seconds[SPARSE]), 5),
        "speedup": round(rounds.speedup, 4),
        "low": None if low is None else round(low, 4),
        "high": None if high is None else round(high, 4),
        **{name: found[name] for name in WORK},
        "rounds": len(rounds.ratios),
        "judged": rounds.interval is not None,
    }


def faults_of(rows: Sequence[Row], config: MInferenceConfig, limits: Limits = LIMITS) -> list[str]:
    """What is wrong with the rows, in one sentence each."""
    faults = []
    for row in rows:
        cell = Cell(row["chunk"], row["tokens"], row["prompts"])
        if fault := judge(row["speedup"], row["low"], row["high"], limits):
            faults.append(f"{cell}: {fault}")
        if cell.goes_sparse(config) != (row["sparse_tokens"] > 0):
            faults.append(f"{cell}: {row['sparse_tokens']} tokens ran sparse, which is not what the gate says")
        if row["redone"]:
            faults.append(f"{cell}: the guard had {row['redone']:.3%} of heads attend to all keys, where none should")
    return faults


def make_spec(options: argparse.Namespace, directory: str, chunk: int) -> dict[str, Any]:
    """What the engines are told for one chunk size."""
    cells = make_cells(options.tiny, ["*"])
    shape, layers = (TINY, TINY_LAYERS) if options.tiny else (LLAMA_8B, LAYERS)
    max_len = max(cell.length for cell in cells) + 16
    write_model(directory, shape, layers, max_len)
    engine = {
        "model": directory, "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16",
        "max_model_len": max_len, "max_num_batched_tokens": chunk, "max_num_seqs": max(cell.prompts for cell in cells),
        "enforce_eager": True, "enable_prefix_caching": False, "disable_log_stats": True,
        "gpu_memory_utilization": TINY_MEMORY if options.tiny else MEMORY_OF_EACH,
    }  # fmt: skip
    minference = {**LOWEST_FLOORS, **(TINY_SETTINGS if options.tiny else {})}
    vocab_size = shape["vocab_size"]
    return {
        "engine": engine, "dense_backend": options.dense_backend, "minference": minference, "vocab_size": vocab_size,
        "seed": options.seed,
    }  # fmt: skip


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of a result file, which must be alike in all parts of one result."""
    with tempfile.TemporaryDirectory(prefix="model-") as directory:
        spec = make_spec(options, directory, 0)
    own = ("model", "max_num_batched_tokens")
    return {
        "seconds": "wall time of LLM.generate for so many prompts at once and one token each, without detokenization, "
        "on an idle engine; medians. The engines are up side by side",
        "rounds": f"each of them answers in each round, in this order: {', '.join(ORDER)}; {ROUNDS}",
        "speedup": "median over rounds of dense's seconds / sparse's; low, high: its 95% interval by the sign test, of "
        "all rounds, as if their number were fixed in advance, which it is but for the one extension",
        "chunk": "max_num_batched_tokens, an engine of each kind for each",
        "sparse_tokens": "prompt tokens that ran sparse in one round; density: kept / causal pairs of their chunks",
        "model": {"shape": TINY if options.tiny else LLAMA_8B, "weights": "dummy"},
        "seed": options.seed,
        "layers": TINY_LAYERS if options.tiny else LAYERS,
        "prompts": "random token ids. One alone is an eighth of a chunk longer than `tokens` where it would fill all "
        "of its chunks, so that its last rows are known and attend to all keys; several at once fill them, and no "
        "last rows are dense",
        "selection": "the choice runs in full; drawn groups are attended to, see minference_vllm.tuning.drawn",
        "guard": GUARD,
        "engine": {key: value for key, value in spec["engine"].items() if key not in own},
        "dense": {"attention_backend": options.dense_backend},
        "sparse": {"attention_backend": SPARSE_BACKEND, "minference": resolved(spec["minference"])},
        "limits": LIMITS._asdict(),
    }


def judged_by(options: argparse.Namespace) -> tuple[MInferenceConfig, Limits]:
    """The settings of the sparse engine, as far as the gate has to do with them, and the limits."""
    if options.tiny:
        return MInferenceConfig.model_validate(TINY_SETTINGS), NO_LIMITS
    return MInferenceConfig(), LIMITS


def measure(options: argparse.Namespace) -> list[Row]:
    """The rows of the cells that are asked for; the file is written after each row."""
    cells = make_cells(options.tiny, options.cells)
    if not cells:
        every = " ".join(map(str, make_cells(options.tiny, ["*"])))
        raise SystemExit(f"--cells {' '.join(options.cells)} fit none of the cells, which are {every}")
    results.describe_run(options.tiny)
    settings, rows = describe(options), []
    config, limits = judged_by(options)
    for chunk, of_chunk in groupby(cells, lambda cell: cell.chunk):
        with tempfile.TemporaryDirectory(prefix="model-") as directory:
            spec = make_spec(options, directory, chunk)
            with (
                EngineProcess("benchmarks.never_slower", DENSE, spec) as dense,
                EngineProcess("benchmarks.never_slower", SPARSE, spec) as sparse,
            ):
                say(f"engines with chunks of {chunk} are up")
                for cell in of_chunk:
                    long = TINY_SECONDS if options.tiny else LONG_SECONDS
                    rows.append(time_cell(cell, dense, sparse, config, long, limits))
                    say(", ".join(f"{name} {value}" for name, value in rows[-1].items()))
                    results.write(options.out, rows, options.tiny, settings=settings)
    return rows


def merge(options: argparse.Namespace) -> list[Row]:
    """The rows of several result files, put together in one.

    Raises:
        SystemExit: together they do not hold each cell exactly once.
    """
    merged = results.merge_or_exit(options.merge)
    found = [Cell(row["chunk"], row["tokens"], row["prompts"]) for row in merged.rows]
    every, parts = make_cells(options.tiny, ["*"]), " ".join(map(str, options.merge))
    if missing := [str(cell) for cell in every if cell not in found]:
        raise SystemExit(f"{parts} lack cells: measure them too, --cells {' '.join(missing)}")
    if len(found) > len(every):
        raise SystemExit(f"{parts} hold {len(found)} cells where there are {len(every)}: leave a part out")
    return merged.write(options.out)


def main() -> None:
    if serve_requests(start):
        return
    parser = argument_parser(__doc__, "two layers of a toy shape, short prompts, the gate at 256 tokens")
    parser.add_argument("--cells", nargs="+", default=["*"], help="which cells: chunk/tokens/prompts, with * and ?")
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing, but merge the rows of these files")
    options = parser.parse_args()
    rows = merge(options) if options.merge else measure(options)
    print(results.table(rows))
    if faults := faults_of(rows, *judged_by(options)):
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main()
