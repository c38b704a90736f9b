# SPDX-License-Identifier: Apache-2.0
"""Time to first token, dense and sparse, on the shape of Llama-3.1-8B with made-up weights, or on a real model.

    python -m benchmarks.ttft --methods block 1000:6096 --out benchmarks/results/h100-ttft.json
    python -m benchmarks.ttft --model /tmp/qwen --text austen.txt.xz --tokens 28672 \
        --out benchmarks/results/h100-ttft-qwen.json
    python -m benchmarks.ttft --merge a.json b.json --out benchmarks/results/h100-ttft.json

The last line merges lengths or methods that were measured on several cards.

Time to first token is the wall time of `LLM.generate` for one prompt and one token, on an idle engine.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import (
    DENSE,
    SPARSE,
    SPARSE_BACKEND,
    argument_parser,
    context,
    facts,
    haystack,
    load_engine,
    parse_method,
    resolved,
    results,
    runtime,
    sparse_work,
    synthetic,
)
from benchmarks.fidelity import load_text
from benchmarks.made_up import LLAMA_8B, TINY, write_model
from benchmarks.processes import EngineProcess, on_gpus, serve_requests

TINY_SETTINGS = {"min_seq_len": 256, "min_chunk": 16}
USUAL = {"tokens": [8192, 32768, 131072], "layers": 32}
TINY_USUAL = {"tokens": [600], "layers": 2}
MEMORY_OF_EACH = 0.47  # share of the GPU's, as two engines run at a time
MEMORY_ALONE = 0.92
WARM_UP = 32768
LONG = 65536  # tokens; from here on two timed requests must do, because they take long
SHORT = 32768
CHUNK = 16512  # not 16,384: a prompt that fills its last chunk is taken for one that goes on (plan.py)
MOST_FOR_SHORT = 16
SPARE = 16  # tokens by which max_model_len exceeds the longest prompt

TTFT = (
    "wall time of LLM.generate for one prompt and one token, without detokenization, on an idle engine in the caller's "
    "process; the median of the timed requests"
)
SIDE_BY_SIDE = ", which the dense and the sparse engine, up side by side, take in turns after one each to warm up"
IN_TURN = (
    f" of the dense engine, after one of {WARM_UP} tokens to warm up, and then of the sparse one, after one of the "
    "same length"
)

REAL_GUARD = "as in service. redone: share of heads that it had attend to all keys"
REAL = "the plugin chooses by itself, as in service: nothing is drawn"
NATURAL = "natural: the plugin chooses by itself; made-up weights have no pattern, so the density means nothing."

WORK = ("sparse_tokens", "density", "redone")
"""Fields of benchmarks.SparseWork that each row records."""

ROW = ("tokens", "method")
"""The fields that tell one row of a result from another."""

Found = tuple[str, int, dict[str, Any]]
"""A method, a prompt length, and what both engines gave."""


def num_timed(tokens: int, repeats: int) -> int:
    """Number of timed requests: few long ones, as they differ little; many short ones, as they differ by percents."""
    if tokens >= LONG:
        return min(repeats, 2)
    return repeats * min(max(SHORT // tokens, 1) ** 2, MOST_FOR_SHORT)


def start_engine(kind: str, spec: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """An engine, and what times a request of it: {"tokens": prompt length, "count": whether to say what ran sparse}."""
    from vllm import SamplingParams

    llm = load_engine(kind, spec)
    if kind == SPARSE and not (spec["natural"] or spec["text"]):
        runtime().chooser = synthetic.make_chooser(spec["seed"])
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    prompts = {tokens: {"prompt_token_ids": make_tokens(spec, tokens)} for tokens in spec["tokens"]}

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        llm.generate([prompts[tokens]], one, use_tqdm=False)
        return time.perf_counter() - start

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if not request["count"]:
            return {"seconds": seconds(request["tokens"])}
        before = sparse_work()
        found = {"seconds": seconds(request["tokens"])}
        delta = sparse_work().since(before)
        return {**found, **{name: getattr(delta, name) for name in WORK}}

    return answer


def make_tokens(spec: dict[str, Any], tokens: int) -> list[int]:
    """`tokens` tokens of the text if there is one, else random ones."""
    if not spec["text"]:
        drawn = np.random.default_rng(spec["seed"]).integers(10, spec["vocab_size"], tokens)
        return [int(token) for token in drawn]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec["engine"]["model"])
    text = facts.cut(tokenizer, load_text(spec["text"]), tokens + tokens // 8, random.Random(spec["seed"]))
    encoded = facts.encode(tokenizer, text)[:tokens]
    if len(encoded) < tokens:
        raise SystemExit(f"the text gives {len(encoded)} tokens where {tokens} are asked for")
    return encoded


def time_side_by_side(dense: EngineProcess, sparse: EngineProcess, tokens: int, repeats: int) -> dict[str, Any]:
    """Both engines' times for one prompt length, and what ran sparse, after a request of each to warm up."""
    found = sparse.ask({"tokens": tokens, "count": True})
    dense.ask({"tokens": tokens, "count": False})
    seconds: dict[str, list[float]] = {DENSE: [], SPARSE: []}
    for i in range(num_timed(tokens, repeats)):
        # The engines take turns to be first, because the clock depends on what ran before.
        for engine in (dense, sparse) if i % 2 else (sparse, dense):
            reply = engine.ask({"tokens": tokens, "count": False})
            seconds[engine.kind].append(round(reply["seconds"], 4))
    for kind, times in seconds.items():
        print(f"    {tokens} tokens, {kind}: {' '.join(f'{t:.3f}' for t in times)} s", flush=True)
    return {**seconds, **{name: found[name] for name in WORK}}


def time_in_turn(engine: EngineProcess, tokens: int, repeats: int, warm_up: int) -> tuple[list[float], dict[str, Any]]:
    """The times of an engine that runs alone, and what ran sparse in its warm-up request.

    Args:
        warm_up: tokens of that request.
    """
    found = engine.ask({"tokens": warm_up, "count": engine.kind == SPARSE})
    seconds = [
        round(engine.ask({"tokens": tokens, "count": False})["seconds"], 4) for _ in range(num_timed(tokens, repeats))
    ]
    print(f"    {tokens} tokens, {engine.kind}: {' '.join(f'{t:.3f}' for t in seconds)} s", flush=True)
    return seconds, found


def make_row(method: str, layers: int | None, tokens: int, found: dict[str, Any]) -> dict[str, Any]:
    """A row made of the result of time_side_by_side."""
    dense_s, sparse_s = statistics.median(found[DENSE]), statistics.median(found[SPARSE])
    return {
        "tokens": tokens,
        "method": method,
        "layers": layers,
        "dense_ttft_s": round(dense_s, 4),
        "sparse_ttft_s": round(sparse_s, 4),
        "speedup": round(dense_s / sparse_s, 4),
        **{name: found[name] for name in WORK},
        "timed_requests": len(found[SPARSE]),
    }


def make_spec(options: argparse.Namespace, directory: str) -> dict[str, Any]:
    max_len = max(options.tokens) + SPARE
    shape = TINY if options.tiny else LLAMA_8B
    if not options.model:
        write_model(directory, shape, options.layers, max_len)
    engine = {
        "model": options.model or directory, "load_format": "auto" if options.model else "dummy",
        "skip_tokenizer_init": True, "dtype": "bfloat16", "max_model_len": max_len,
        "max_num_batched_tokens": options.chunk, "max_num_seqs": 8, "enforce_eager": True,
        "enable_prefix_caching": False, "disable_log_stats": True,
        "gpu_memory_utilization": MEMORY_ALONE if options.in_turn else MEMORY_OF_EACH, **on_gpus(options.gpus),
        **context.stretched(options.model, options.context),
    }  # fmt: skip
    return {
        "engine": engine,
        "dense_backend": options.dense_backend,
        "vocab_size": shape["vocab_size"],
        **{name: getattr(options, name) for name in ("tokens", "repeats", "seed", "natural", "text")},
    }


def describe(options: argparse.Namespace, spec: dict[str, Any]) -> dict[str, Any]:
    """The settings of a result file. Each engine's come under "sparse" when it is started."""
    made_up = {"shape": TINY if options.tiny else LLAMA_8B, "layers": options.layers, "weights": "dummy"}
    return {
        "ttft": TTFT + (IN_TURN if options.in_turn else SIDE_BY_SIDE),
        "gpus": options.gpus,
        "model": haystack.identify_model(options.model) if options.model else made_up,
        "seed": options.seed,
        "prompts": f"from {Path(options.text).name}" if options.text else "random token ids",
        # Parts of one result may read prompts of other lengths.
        "engine": {
            **{key: value for key, value in spec["engine"].items() if key != "model"},
            "max_model_len": f"tokens of the longest prompt of a run + {SPARE}",
        },
        "dense": {"attention_backend": options.dense_backend},
        "sparse": {"attention_backend": SPARSE_BACKEND},
        "guard": REAL_GUARD if options.text else synthetic.GUARD,
        "selection": REAL if options.text else NATURAL if options.natural else synthetic.DESCRIPTION,
    }


def sparse_engine(
    options: argparse.Namespace, spec: dict[str, Any], method: str, settings: dict[str, Any]
) -> EngineProcess:
    """An engine of the plugin. Its settings are added to those of the result file."""
    minference: dict[str, Any] = {"method": parse_method(method), **({} if options.text else synthetic.LOWEST_FLOORS)}
    minference |= TINY_SETTINGS if options.tiny else {}
    settings["sparse"][method] = resolved(minference)
    return EngineProcess("benchmarks.ttft", SPARSE, {**spec, "minference": minference}, options.gpus)


def side_by_side(options: argparse.Namespace, spec: dict[str, Any], settings: dict[str, Any]) -> Iterator[Found]:
    """What both engines give if they run at the same time."""
    with EngineProcess("benchmarks.ttft", DENSE, spec, options.gpus) as dense:
        for method in options.methods:
            with sparse_engine(options, spec, method, settings) as sparse:
                for tokens in options.tokens:
                    yield method, tokens, time_side_by_side(dense, sparse, tokens, options.repeats)


def in_turn(options: argparse.Namespace, spec: dict[str, Any], settings: dict[str, Any]) -> Iterator[Found]:
    """What the engines give if they run one after the other."""
    warm_up = {**spec, "tokens": [*spec["tokens"], min(WARM_UP, *spec["tokens"])]}
    with EngineProcess("benchmarks.ttft", DENSE, warm_up, options.gpus) as engine:
        dense = {
            tokens: time_in_turn(engine, tokens, options.repeats, min(WARM_UP, tokens))[0] for tokens in options.tokens
        }
    for method in options.methods:
        with sparse_engine(options, spec, method, settings) as engine:
            for tokens in options.tokens:
                # The warm-up has the timed length, because keys for a length are drawn during it.
                seconds, found = time_in_turn(engine, tokens, options.repeats, tokens)
                yield method, tokens, {**found, DENSE: dense[tokens], SPARSE: seconds}


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__, "a few layers of a toy shape, the gate at 256 tokens")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=argparse.SUPPRESS, help=f"prompt lengths; usually {USUAL['tokens']}"
    )
    parser.add_argument("--layers", type=int, default=argparse.SUPPRESS, help=f"usually {USUAL['layers']}")
    parser.add_argument("--repeats", type=int, default=3, help="timed requests, if neither very long nor very short")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="max_num_batched_tokens")
    parser.add_argument(
        "--methods", nargs="+", default=["block"], help="`block`, or vertical_slash by its sizes: 1000:6096"
    )
    parser.add_argument("--natural", action="store_true", help="let the plugin choose by itself")
    parser.add_argument("--model", help="a directory with real weights, in place of made-up ones; with --text")
    context.add_argument(parser)
    parser.add_argument("--text", help="a file, as for benchmarks.fidelity, that prompts are cut from")
    parser.add_argument("--gpus", type=int, default=1, help="tensor-parallel GPUs of each engine")
    parser.add_argument("--in-turn", action="store_true", help="run one engine after the other, each with all memory")
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing, but merge the rows of these files")
    options = parser.parse_args()
    if bool(options.model) != bool(options.text) or (options.context and not options.model):
        parser.error("--model and --text go together, and --context only with them")
    for name, usual in (TINY_USUAL if options.tiny else USUAL).items():
        vars(options).setdefault(name, usual)
    return options


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows, written after each."""
    results.describe_run(options.tiny)
    rows, seconds = [], {}
    with tempfile.TemporaryDirectory(prefix="model-") as directory:
        spec = make_spec(options, directory)
        settings = describe(options, spec)
        for method, tokens, found in (in_turn if options.in_turn else side_by_side)(options, spec, settings):
            seconds[f"{method}, {tokens} tokens"] = {kind: found[kind] for kind in (DENSE, SPARSE)}
            rows.append(make_row(method, None if options.model else options.layers, tokens, found))
            # Written after each row, so that a run that is cut off keeps what it has measured.
            results.write(options.out, rows, options.tiny, settings=settings, seconds=seconds)
    return rows


def main() -> None:
    if serve_requests(start_engine):
        return
    options = parse()
    rows = results.merge_or_exit(options.merge, ROW).write(options.out) if options.merge else measure(options)
    print(results.table(rows))


if __name__ == "__main__":
    main()
