# SPDX-License-Identifier: Apache-2.0
"""What sparse prefill does to a model's next tokens: the real engine, dense against each method on the same prompts.

    python -m benchmarks.fidelity --model /tmp/qwen --texts austen.txt.xz pydoc.txt.xz stdlib \
        --out benchmarks/results/h100-fidelity.json

The last tokens of each prompt are scored over the whole vocabulary, from the hidden states after the last layer.

A method is given by its name alone, by the sizes of vertical_slash, or by a name and settings in JSON:

    --methods block 1000:6096 'vertical_slash:{"vertical_size": 1000, "slash_size": 1000, "probe_rows": "spread"}' \
        'vertical_slash:{"share": 0.95}' 'vertical_slash:{"share": 0.95, "probe_rows": "spread"}'

Settings of the plugin beside the method are given as an object:

    --methods block '{"method": {"name": "block", "share": 0.85}, "recall_floor": 0.5}'

With --one-engine all methods are measured in one sparse engine for each size of chunks, which takes the settings of one
after the other. That is quicker, for trials; what the engine profiled at its start is the first method's scratch only.

A control keeps every key, so that it differs by rounding only: 'block:{"local_tokens": 1048576}'.

Prompts longer than the model was trained for, its positions stretched by YaRN to 131,072 tokens:

    --tokens 28672 61440 126976 --context 131072 --chunks 16384

In parts by length, chunk or method, on several cards, and then merged. All parts need the same texts, which are pooled:

    python -m benchmarks.fidelity --model /tmp/qwen --texts austen.txt.xz stdlib --tokens 28672 --out a.json
    python -m benchmarks.fidelity --model /tmp/qwen --texts austen.txt.xz stdlib --tokens 4096 8192 --out b.json
    python -m benchmarks.fidelity --merge a.json b.json --out benchmarks/results/h100-fidelity.json
"""

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks import (
    DENSE,
    SPARSE,
    SPARSE_BACKEND,
    argument_parser,
    context,
    facts,
    haystack,
    load_engine,
    parse_settings,
    resolved,
    results,
    rows,
)
from benchmarks.processes import EngineProcess, on_gpus, serve_requests
from benchmarks.reconfigure import reconfigure
from benchmarks.scoring import scorer
from minference_vllm.evals import material
from minference_vllm.search.prompts import load_library

SCORED_TEXT = 2048  # tokens at the text's end, in addition to all questions and answers
GATE = {"min_seq_len": 3072, "min_chunk": 512}
TINY_GATE = {"min_seq_len": 512, "min_chunk": 64}
STDLIB = "stdlib"  # given in place of a file, it stands for Python's library as installed here
ROW = ("tokens", "text", "method", "chunk")  # what tells one row from another
MEMORY = 0.4  # of a GPU, for each of two engines
SPARE = 2048  # tokens by which max_model_len exceeds the prompts' lengths


def load_text(name: str) -> str:
    """A plain text, one compressed by xz, or the sources of Python's library, in alphabetical order."""
    if name == STDLIB:
        return load_library()
    return material.load_text(Path(name), option="the text")


def start_engine(kind: str, spec: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """An engine, as a function that scores a prompt with it, or takes other settings: {"settings": ..}."""
    llm = load_engine(kind, spec)
    score = scorer(kind, llm)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        if settings := request.get("settings"):
            reconfigure(llm, settings)
            return {}
        return score(request)

    return answer


def make_requests(options: argparse.Namespace, directory: str) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """The requests, by length and text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    requests: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for name in options.texts:
        text = load_text(name)
        for tokens in options.tokens:
            for number in range(options.prompts):
                prompt = facts.make_prompt(tokenizer, text, tokens, options.seed + number)
                file = Path(directory, f"{Path(name).name}-{tokens}-{number}.pt")
                requests.setdefault((tokens, Path(name).name), []).append(make_request(prompt, file))
    return requests


def make_request(prompt: facts.FactPrompt, file: Path) -> dict[str, Any]:
    """What both engines are asked; the dense one leaves its hidden states in the file."""
    return {**prompt._asdict(), "scored": max(1, prompt.text_end - SCORED_TEXT), "file": str(file)}


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__, "short prompts, the gate at 512 tokens")
    parser.add_argument("--model", help="a model directory")
    parser.add_argument("--texts", nargs="+", help=f"files, or {STDLIB!r} for Python's own library")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 28672], help="prompt lengths")
    context.add_argument(parser)
    parser.add_argument("--prompts", type=int, default=8, help="prompts a text and length")
    parser.add_argument("--kv-cache-dtype", default="auto", help="of both engines, for example fp8")
    parser.add_argument("--gpus", type=int, default=1, help="tensor-parallel GPUs of each engine")
    parser.add_argument("--memory", type=float, default=MEMORY, help="part of a GPU's memory that each engine takes")
    parser.add_argument("--chunks", type=int, nargs="+", default=[8192, 2048], help="max_num_batched_tokens")
    parser.add_argument(
        "--methods", nargs="+", default=["block", "1000:6096", "1000:1000", "200:400"],
        help='`block`, `vertical_slash:{"share": 0.95}`, the sizes of vertical_slash, or an object of settings',
    )  # fmt: skip
    parser.add_argument("--one-engine", action="store_true", help="measure all methods in one engine, without `auto`")
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing, but merge the rows of these files")
    options = parser.parse_args()
    if not options.merge and not (options.model and options.texts):
        parser.error("--model and --texts say what to measure, --merge what to put together")
    return options


def make_spec(options: argparse.Namespace, chunk: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What an engine is told.

    Args:
        settings: the plugin's, beside the gate.
    """
    gate = TINY_GATE if options.tiny else GATE
    return {
        "engine": {
            **engine_options(options.model, max(options.tokens), chunk, options.memory),
            **context.stretched(options.model, options.context),
            "kv_cache_dtype": options.kv_cache_dtype,
            **on_gpus(options.gpus),
        },
        "dense_backend": options.dense_backend,
        "minference": {**gate, **settings},
    }


def engine_options(model: str, tokens: int, chunk: int, memory: float = MEMORY) -> dict[str, Any]:
    """Options of an engine that reads one prompt of about `tokens` tokens at a time, in chunks.

    Args:
        memory: the part of a GPU's memory that the engine takes.
    """
    return {
        "model": model, "dtype": "bfloat16", "max_model_len": tokens + SPARE,
        "max_num_batched_tokens": chunk, "max_num_seqs": 1, "enforce_eager": True, "enable_prefix_caching": False,
        "gpu_memory_utilization": memory, "disable_log_stats": True,
    }  # fmt: skip


def describe(options: argparse.Namespace, spec: dict[str, Any]) -> dict[str, Any]:
    """The settings of a result file. Each engine's come under "sparse" when it is started."""
    texts = {Path(name).name: sha256(load_text(name).encode()).hexdigest() for name in options.texts}
    return {
        "prompts": "twenty facts hidden in a text, all asked for at its end, the answers given (benchmarks.facts); one "
        f"request at a time. Scored are the text's last {SCORED_TEXT} tokens, the questions and the answers, over the "
        "whole vocabulary. answers: share of the answers' tokens that are the model's first choice",
        "model": haystack.identify_model(options.model),
        "seed": options.seed,
        "texts_sha256": texts,
        # Parts of one result may read prompts of other lengths.
        "engine": {
            **{key: value for key, value in spec["engine"].items() if key != "model"},
            "max_model_len": f"tokens of the longest prompts of a run + {SPARE}",
        },
        "dense": {"attention_backend": options.dense_backend},
        "sparse": {"attention_backend": SPARSE_BACKEND},
        "recall, redone": "held-out rows' attention on the keys kept, mean over layers, heads and chunks, before the "
        "guard acted; share of those heads that the guard then had attend to all keys (density counts both)",
        "tokens": "that prompts are to have; they have some 440 fewer, all of which sparse_tokens counts",
        "answers_low, answers_high, answer_loss_low, answer_loss_high": rows.INTERVALS,
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows, written after each method."""
    results.describe_run(options.tiny)
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="fidelity-") as directory:
        requests = make_requests(options, directory)
        spec = make_spec(options, options.chunks[0], {})
        settings = describe(options, spec)
        with EngineProcess("benchmarks.fidelity", DENSE, spec, options.gpus) as dense:
            for request in [request for some in requests.values() for request in some]:
                dense.ask(request)
        for method, chunk, spec, sparse in sparse_engines(options):
            settings["sparse"][f"{method}, chunks of {chunk}"] = resolved(spec["minference"])
            found = {key: [sparse.ask(request) for request in some] for key, some in requests.items()}
            measured += rows.make_rows({"method": method, "chunk": chunk}, found)
            print(results.table(measured), flush=True)
            # Written after each method, so that a run that is cut off keeps what it has measured.
            results.write(options.out, measured, options.tiny, settings=settings)
    return measured


def sparse_engines(options: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, Any], EngineProcess]]:
    """For each method and size of chunks an engine that has these settings: (method, chunk, spec, engine)."""
    of_engines = [options.methods] if options.one_engine else [[method] for method in options.methods]
    for chunk, methods in itertools.product(options.chunks, of_engines):
        first, *others = [(text, chunk, make_spec(options, chunk, parse_settings(text))) for text in methods]
        with EngineProcess("benchmarks.fidelity", SPARSE, first[-1], options.gpus) as engine:
            yield *first, engine
            for other in others:
                engine.ask({"settings": other[-1]["minference"]})
                yield *other, engine


def merge(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of several result files, put together in one.

    Raises:
        SystemExit: the files do not fit, or are of different texts: rows of "all" texts would then be of some only.
    """
    merged = results.merge_or_exit(options.merge, ROW)
    texts = merged.run["settings"]["texts_sha256"]
    for part in options.merge:
        if lacking := texts.keys() - results.read(part)["settings"]["texts_sha256"].keys():
            raise SystemExit(f"{part} lacks texts that another part has: {', '.join(sorted(lacking))}")
    return merged.write(options.out)


def main() -> None:
    if serve_requests(start_engine):
        return
    options = parse()
    print(results.table(merge(options) if options.merge else measure(options)))


if __name__ == "__main__":
    main()
