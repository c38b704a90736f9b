# SPDX-License-Identifier: Apache-2.0
"""Whether the guard keeps dense attention's answers where a choice of keys fails: the real engine, on such prompts.

    python -m benchmarks.guard --model /tmp/qwen --texts austen.txt.xz stdlib --out benchmarks/results/guard.json

It also runs one chunk without a model, in which some middle rows each look at one far key (benchmarks.far_rows).
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import DENSE, SPARSE, argument_parser, far_rows, parse_method, resolved, results
from benchmarks.fidelity import GATE, MEMORY, TINY_GATE, engine_options, load_text, make_request, start_engine
from benchmarks.processes import EngineProcess, serve_requests
from benchmarks.rows import make_row
from benchmarks.traps import TRAPS

GUARDS: dict[str, dict[str, float]] = {"on": {}, "off": {"recall_floor": 0.0, "row_recall_floor": 0.0}}

SETTINGS = {
    "prompts": "benchmarks.traps. answers: share of the tokens of answers, or of the copied passage, that are the "
    "model's first choice",
    "far rows": "no model: benchmarks.far_rows, whose rows are described there",
    "recall": "mean over layers, heads and chunks, before the guard acted",
    "redone": "share of heads of chunks that the guard had attend to all keys; density counts both",
}


def make_requests(options: argparse.Namespace, directory: str) -> dict[str, list[dict[str, Any]]]:
    """The requests, by kind of prompt."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [load_text(name) for name in options.texts]
    requests: dict[str, list[dict[str, Any]]] = {}
    for kind, make in TRAPS.items():
        for number in range(options.prompts):
            prompt = make(tokenizer, texts, options.tokens, options.seed + number)
            requests.setdefault(kind, []).append(make_request(prompt, Path(directory, f"{kind}-{number}.pt")))
    return requests


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__, "short prompts, the gate at 512 tokens")
    parser.add_argument("--model", required=True, help="a model directory")
    parser.add_argument("--texts", nargs=2, required=True, help="files, or 'stdlib' for Python's own library")
    parser.add_argument("--tokens", type=int, default=28672, help="prompt length")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of each kind")
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--memory", type=float, default=MEMORY, help="part of a GPU's memory that each engine takes")
    methods = ["block", "1000:1000", "200:400"]
    parser.add_argument("--methods", nargs="+", default=methods, help="as for benchmarks.fidelity")
    return parser.parse_args()


def measure_traps(options: argparse.Namespace, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    """Add a row for each kind of prompt and each method, with and without the guard."""
    gate = TINY_GATE if options.tiny else GATE
    with tempfile.TemporaryDirectory(prefix="guard-") as directory:
        requests = make_requests(options, directory)
        engine = engine_options(options.model, options.tokens, options.chunk, options.memory)
        spec = {"engine": engine, "dense_backend": options.dense_backend}
        settings["engine"] = {key: value for key, value in engine.items() if key != "model"}
        with EngineProcess("benchmarks.guard", DENSE, spec) as dense:
            for request in [request for some in requests.values() for request in some]:
                dense.ask(request)
        for text in options.methods:
            for guard, floors in GUARDS.items():
                minference = {**gate, **floors, "method": parse_method(text)}
                settings["sparse"][f"{text}, guard {guard}"] = resolved(minference)
                with EngineProcess("benchmarks.guard", SPARSE, {**spec, "minference": minference}) as sparse:
                    for kind, some in requests.items():
                        of = {"kind": kind, "method": text, "guard": guard, "tokens": options.tokens}
                        rows.append(make_row(of, [sparse.ask(request) for request in some]))
                        print(rows[-1], flush=True)
                # Written after each engine, so that a run that is cut off keeps what it has measured.
                results.write(options.out, rows, options.tiny, settings=settings)


def main() -> None:
    if serve_requests(start_engine):
        return
    options = parse()
    results.describe_run(options.tiny)
    rows: list[dict[str, Any]] = []
    settings: dict[str, Any] = {**SETTINGS, "sparse": {}}
    measure_traps(options, rows, settings)
    for text in options.methods:
        for guard, floors in GUARDS.items():
            of = {"kind": "far rows", "method": text, "guard": guard, "tokens": options.tokens}
            minference = {**floors, "method": parse_method(text)}
            rows.append({**of, **far_rows.measure(minference, options.tokens, options.chunk, options.seed)})
            print(rows[-1], flush=True)
    results.write(options.out, rows, options.tiny, settings=settings)


if __name__ == "__main__":
    main()
