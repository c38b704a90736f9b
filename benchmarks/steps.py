# SPDX-License-Identifier: Apache-2.0
"""What the plugin adds to the host time of steps in which nothing runs sparse, in an engine that serves without pause.

    python -m benchmarks.steps --out benchmarks/results/h100-steps.json

Each step's metadata is built by the plugin or, drawn by lot, by vLLM's own builder: what the plugin adds is the
difference of the medians, and the clock's own time is in both.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

from benchmarks import SPARSE, SPARSE_BACKEND, argument_parser, load_engine, resolved, results
from benchmarks.processes import EngineProcess, serve_worker
from benchmarks.ttft import LLAMA_8B, TINY, write_model

clock = time.perf_counter

GATE, PROMPT, MOST_ANSWER = 2048, 64, 8  # tokens
TINY_GATE = 256
ONE_IS_LONG = 4  # times max_num_seqs: of so many requests one is as long as the gate asks for
MAX_LEN = 4096
RESAMPLES = 500


class TimedStep(NamedTuple):
    """One dense step's metadata, built.

    Attributes:
        rows: "prefill" if the step reads prompts, else "decode".
        beside: which of BESIDE it is.
        ours: whether the plugin's builder built it, or vLLM's.
        us: microseconds that took.
        looking: how many layers look for a plan in this step; the others are vLLM's own.
    """

    rows: str
    beside: str
    ours: bool
    us: float
    looking: int


SHORT, LONG, AFTER = BESIDE = "short contexts", "a long context", "after a sparse step"
"""No request is as long as the gate asks for; one is, but reads no chunk that could go sparse; the step before ran
sparse."""


def time_steps(ours: Any, seed: int) -> list[TimedStep]:
    """The list that every step in which nothing runs sparse adds itself to, from now on.

    Args:
        ours: a builder class of the plugin's.
        seed: of the lots.
    """
    stock = next(kind for kind in ours.__mro__[1:] if "build" in vars(kind))
    builds, lots, steps = (stock.build, ours.build), random.Random(seed), []
    after_sparse = False

    def build(self: Any, common_prefix_len: int, common: Any, *arguments: Any, **settings: Any) -> Any:
        nonlocal after_sparse
        is_long = common.max_seq_len >= self._min_seq_len
        may_be_sparse = is_long and common.max_query_len >= self._min_chunk
        is_ours = may_be_sparse or lots.random() < 0.5
        method = builds[is_ours]
        clock()  # with the CPU's caches empty the first reading takes longer
        start = clock()
        metadata = method(self, common_prefix_len, common, *arguments, **settings)
        us = 1e6 * (clock() - start)
        if not may_be_sparse:
            beside = AFTER if after_sparse else LONG if is_long else SHORT
            looking = sum(impl.forward.__module__.startswith("minference_vllm") for impl in self._layers.layers)
            steps.append(TimedStep("prefill" if common.max_query_len > 1 else "decode", beside, is_ours, us, looking))
        after_sparse = hasattr(metadata, "minference")
        return metadata

    ours.build = build
    return steps


def worker(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Every timed step of one engine that serves spec["requests"] requests at once."""
    from vllm import SamplingParams

    from minference_vllm.metadata import PlanningMixin

    llm = load_engine(kind, spec)
    lots, one_is_long = random.Random(spec["seed"]), ONE_IS_LONG * spec["engine"]["max_num_seqs"]

    def serve(count: int) -> None:
        prompts, answers = [], []
        for i in range(count):
            length = lots.randint(2, PROMPT) if i % one_is_long else spec["gate"]
            prompts.append({"prompt_token_ids": [lots.randrange(10, spec["vocab_size"]) for _ in range(length)]})
            tokens = lots.randint(1, MOST_ANSWER)
            answers.append(SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False))
        llm.generate(prompts, answers, use_tqdm=False)

    serve(2 * spec["engine"]["max_num_seqs"])
    timed = [time_steps(ours, spec["seed"]) for ours in PlanningMixin.__subclasses__()]
    serve(spec["requests"])
    return {"steps": max(timed, key=len)}  # one of the classes is in use


def make_rows(steps: Sequence[TimedStep], max_num_seqs: int) -> list[dict[str, Any]]:
    """A row for each kind of step that came up."""
    rows = []
    for kind in product(("prefill", "decode"), BESIDE):
        some = [step for step in steps if (step.rows, step.beside) == kind]
        times = [[step.us for step in some if step.ours is ours] for ours in (False, True)]
        if min(map(len, times)) < 2:
            continue
        stock, ours = map(statistics.median, times)
        rows.append(
            {
                "max_num_seqs": max_num_seqs,
                "step": kind[0],
                "beside": kind[1],
                "steps": len(some),
                "stock_us": round(stock, 1),
                "ours_us": round(ours, 1),
                "added_us": round(ours - stock, 1),
                "error_us": round(_error(*times), 1),
                "looking_layers": max(step.looking for step in some if step.ours),
            }
        )
    return rows


def _error(stock: list[float], ours: list[float]) -> float:
    """Standard error of the difference of the medians, by bootstrap."""
    lots = random.Random(0)

    def resampled(times: list[float]) -> float:
        return statistics.median(lots.choices(times, k=len(times)))

    return statistics.stdev(resampled(ours) - resampled(stock) for _ in range(RESAMPLES))


def make_spec(options: argparse.Namespace, directory: str, max_num_seqs: int) -> dict[str, Any]:
    shape, layers = (TINY, 2) if options.tiny else (LLAMA_8B, 32)
    write_model(directory, shape, layers, MAX_LEN)
    gate = TINY_GATE if options.tiny else GATE
    return {
        "engine": {
            "model": directory, "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16",
            "max_model_len": MAX_LEN, "max_num_batched_tokens": 16384, "max_num_seqs": max_num_seqs,
            "enforce_eager": True, "enable_prefix_caching": False, "disable_log_stats": True,
        },
        "minference": {"min_seq_len": gate, "min_chunk": gate // 2},
        "gate": gate,
        "requests": options.requests * max_num_seqs,
        "vocab_size": shape["vocab_size"],
        "seed": options.seed,
    }  # fmt: skip


def describe(spec: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "us": "host time to build a step's attention metadata, in steps that stay dense, medians: ours, by lot "
        "instead of vLLM's (stock), and what that adds, with the standard error by bootstrap. looking_layers: how many "
        "layers are the plugin's in a step that it built; the others are vLLM's own. A thread counts later",
        "model": {"shape": TINY if options.tiny else LLAMA_8B, "weights": "dummy"},
        "requests": f"all at once, prompts of 2 to {PROMPT} tokens, of {ONE_IS_LONG} times max_num_seqs one of "
        f"{spec['gate']}, answers of 1 to {MOST_ANSWER}; random token ids",
        "engine": {key: value for key, value in spec["engine"].items() if key not in ("model", "max_num_seqs")},
        "attention_backend": SPARSE_BACKEND,
        "minference": resolved(spec["minference"]),
    }


def main() -> None:
    if serve_worker(worker):
        return
    parser = argument_parser(__doc__, "two layers of a toy shape, the gate at 256 tokens", compares=False)
    parser.add_argument("--seqs", type=int, nargs="+", default=[8, 64, 256], help="max_num_seqs, an engine each")
    parser.add_argument("--requests", type=int, default=192, help="how many for each of max_num_seqs")
    options = parser.parse_args()
    results.describe_run(options.tiny)
    rows: list[dict[str, Any]] = []
    for max_num_seqs in options.seqs:
        with tempfile.TemporaryDirectory(prefix="model-") as directory:
            spec = make_spec(options, directory, max_num_seqs)
            with EngineProcess("benchmarks.steps", SPARSE, spec) as engine:
                found = engine.ask(None)
        rows += make_rows([TimedStep(*step) for step in found["steps"]], max_num_seqs)
        results.write(options.out, rows, options.tiny, settings=describe(spec, options))
    print(results.table(rows))


if __name__ == "__main__":
    main()
