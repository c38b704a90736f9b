# SPDX-License-Identifier: Apache-2.0
"""What the plugin adds to the host time of steps in which nothing runs sparse, in an engine that serves without pause.

    python -m benchmarks.steps --out benchmarks/results/h100-steps.json

For each step, a random draw decides whether it is run by the plugin's builder and layers, or by those of vLLM's that
they derive from. What the plugin adds is the difference of the medians; the clock's own time is in both.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import product
from typing import Any

from benchmarks import SPARSE, SPARSE_BACKEND, argument_parser, load_engine, resolved, results
from benchmarks.made_up import LLAMA_8B, TINY, write_model
from benchmarks.processes import EngineProcess, serve_worker

clock = time.perf_counter

GATE, PROMPT, MOST_ANSWER = 2048, 64, 8  # tokens
TINY_GATE = 256
TINY_MEMORY = 0.3  # of the machine's memory, which a smoke test shares with others
ONE_IS_LONG = 4  # one of this many times max_num_seqs requests is as long as the gate asks for
MAX_LEN = 4096
RESAMPLES = 500


@dataclass(slots=True)
class TimedStep:
    """One dense step.

    Attributes:
        rows: "prefill" if the step reads prompts, else "decode".
        beside: the kind of step, one of BESIDE.
        ours: whether the plugin's builder and layers ran it, or vLLM's.
        build_us: microseconds of the host to build its metadata.
        layers_us: microseconds of the host in all layers' forward.
    """

    rows: str
    beside: str
    ours: bool
    build_us: float
    layers_us: float = 0.0


SHORT, LONG, AFTER = BESIDE = "short contexts", "a long context", "after a sparse step"
"""In a step of the first kind no request is as long as the gate asks for. In the second one is, but it reads no chunk
that could run sparse. In the third, the step before ran sparse."""


class StepTimer:
    """Times every step in which nothing runs sparse. A random draw may have vLLM's own code run it.

    Args:
        seed: of the draws.

    Attributes:
        steps: what was timed.
    """

    def __init__(self, seed: int) -> None:
        self.steps: list[TimedStep] = []
        self._lots = random.Random(seed)
        self._step: TimedStep | None = None  # the step that runs now, if it is timed
        self._after_sparse = False

    def watch_builder(self, ours: Any) -> None:
        """Time a builder class of the plugin."""
        builds = {False: inherited(ours, "build"), True: ours.build}

        def build(builder: Any, common_prefix_len: int, common: Any, *arguments: Any, **settings: Any) -> Any:
            is_long = common.max_seq_len >= builder._min_seq_len
            may_be_sparse = is_long and common.max_query_len >= builder._min_chunk
            is_ours = may_be_sparse or self._lots.random() < 0.5
            method = builds[is_ours]
            clock()  # the first reading of the clock takes longer, as the CPU's caches are cold
            start = clock()
            metadata = method(builder, common_prefix_len, common, *arguments, **settings)
            us = 1e6 * (clock() - start)
            self._step = None
            if not may_be_sparse:
                beside = AFTER if self._after_sparse else LONG if is_long else SHORT
                rows = "prefill" if common.max_query_len > 1 else "decode"
                self._step = TimedStep(rows, beside, is_ours, us)
                self.steps.append(self._step)
            self._after_sparse = hasattr(metadata, "minference")
            return metadata

        ours.build = build

    def watch_layers(self, ours: Any) -> None:
        """Time a layer class of the plugin."""
        forwards = {False: inherited(ours, "forward"), True: ours.forward}

        def forward(layer: Any, *arguments: Any, **settings: Any) -> Any:
            step = self._step
            if step is None:
                return forwards[True](layer, *arguments, **settings)
            method = forwards[step.ours]
            start = clock()
            output = method(layer, *arguments, **settings)
            step.layers_us += 1e6 * (clock() - start)
            return output

        ours.forward = forward


def inherited(ours: Any, name: str) -> Any:
    """The method of vLLM's that a class of the plugin overrides."""
    return next(vars(kind)[name] for kind in ours.__mro__[1:] if name in vars(kind))


def worker(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Every timed step of one engine that serves spec["requests"] requests at once."""
    from vllm import SamplingParams

    from minference_vllm.impl import SparseLayerMixin
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
    timer = StepTimer(spec["seed"])
    for ours in PlanningMixin.__subclasses__():  # the GPU's and the CPU's class, of which one is in use
        timer.watch_builder(ours)
    for ours in SparseLayerMixin.__subclasses__():
        timer.watch_layers(ours)
    serve(spec["requests"])
    return {"steps": [astuple(step) for step in timer.steps]}


def make_rows(steps: Sequence[TimedStep], max_num_seqs: int) -> list[dict[str, Any]]:
    """A row for each kind of step that occurred."""
    rows = []
    for kind in product(("prefill", "decode"), BESIDE):
        some = [step for step in steps if (step.rows, step.beside) == kind]
        stock, ours = ([step for step in some if step.ours is is_ours] for is_ours in (False, True))
        if min(len(stock), len(ours)) < 2:
            continue
        row = {"max_num_seqs": max_num_seqs, "step": kind[0], "beside": kind[1], "steps": len(some)}
        row |= compare("", [step.build_us for step in stock], [step.build_us for step in ours])
        row |= compare("layers_", [step.layers_us for step in stock], [step.layers_us for step in ours])
        rows.append(row)
    return rows


def compare(name: str, stock: list[float], ours: list[float]) -> dict[str, float]:
    """Fields of a row: the medians, their difference, and its standard error by bootstrap."""
    lots = random.Random(0)

    def resampled(times: list[float]) -> float:
        return statistics.median(lots.choices(times, k=len(times)))

    medians = statistics.median(stock), statistics.median(ours)
    fields = {
        "stock_us": medians[0],
        "ours_us": medians[1],
        "added_us": medians[1] - medians[0],
        "error_us": statistics.stdev(resampled(ours) - resampled(stock) for _ in range(RESAMPLES)),
    }
    return {f"{name}{field}": round(us, 1) for field, us in fields.items()}


def make_spec(options: argparse.Namespace, directory: str, max_num_seqs: int) -> dict[str, Any]:
    shape, layers = (TINY, 2) if options.tiny else (LLAMA_8B, 32)
    write_model(directory, shape, layers, MAX_LEN)
    gate = TINY_GATE if options.tiny else GATE
    return {
        "engine": {
            "model": directory, "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16",
            "max_model_len": MAX_LEN, "max_num_batched_tokens": 16384, "max_num_seqs": max_num_seqs,
            "enforce_eager": True, "enable_prefix_caching": False, "disable_log_stats": True,
            **({"gpu_memory_utilization": TINY_MEMORY} if options.tiny else {}),
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
        "instead of vLLM's (stock), and what that adds, with the standard error by bootstrap. A thread counts later",
        "layers_us": "the same of the host's time in the forward of all attention layers together: FlashAttention's "
        "launches, and before them ours looks for a plan",
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
    parser.add_argument("--seqs", type=int, nargs="+", default=[8, 64, 256], help="max_num_seqs of each engine")
    parser.add_argument("--requests", type=int, default=192, help="number of requests, for each of --seqs")
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
