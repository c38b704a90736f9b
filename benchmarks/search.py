# SPDX-License-Identifier: Apache-2.0
"""Compares a pattern file made by `minference-vllm search` with the default method: next tokens, answers and time.

    python -m benchmarks.search --model /tmp/qwen --texts austen.txt.xz pydoc.txt.xz stdlib \
        --search-texts austen.txt.xz pydoc.txt.xz --out benchmarks/results/search-qwen.json

The search reads the second halves of its texts, the comparison reads first halves. Prompts are those of
benchmarks.fidelity. Three engines run at the same time and are asked in turns: one with vLLM's own attention, one with
the default method, one with the file.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import DENSE, SPARSE, facts, fidelity, load_engine, resolved, results
from benchmarks.processes import EngineProcess, serve_requests
from benchmarks.rows import ALL, make_row
from benchmarks.scoring import scorer
from minference_vllm.patterns import read_pattern

MODULE = "benchmarks.search"
DEFAULT, SEARCHED = "default", "searched file"
TIMED_READINGS = 3
MEMORY = 0.28  # of the GPU, for each of three engines
NOT_BETTER = 3  # exit status of the search


def start_engine(kind: str, spec: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """An engine, as a function that scores a prompt as benchmarks.fidelity does and adds its time, "ms"."""
    from minference_vllm.compat import engines

    llm = load_engine(kind, spec)
    score = scorer(kind, llm)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        found, times = score(request), []
        for _ in range(TIMED_READINGS):
            start = time.perf_counter()
            engines.read_tokens(llm, request["tokens"])
            times.append(time.perf_counter() - start)
        return {**found, "ms": 1000 * statistics.median(times)}

    return answer


def search(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run `minference-vllm search`.

    Returns:
        What the result records of the search, and under "file" the pattern file; None if the search wrote none.
    """
    data = [second_half(name, max(options.tokens), folder) for name in options.search_texts or options.texts]
    out = (options.keep or folder) / "pattern.json"
    command = [
        *(sys.executable, "-m", "minference_vllm.cli", "search", options.model, "--data", *map(str, data)),
        *("--out", str(out), *options.search_options.split()),
    ]
    start = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode not in (0, NOT_BETTER):
        sys.exit(f"The search ended with status {done.returncode}; its output above says why.")
    said = re.search("^On .*$", done.stdout, re.MULTILINE)
    return {
        "seconds": round(time.monotonic() - start, 1),
        "options": options.search_options,
        "said": said[0] if said else "",
        "file": out if done.returncode == 0 else None,
    }


def second_half(name: str, tokens: int, folder: Path) -> Path:
    """The second half of a text, without what a prompt that begins in the first half may reach."""
    text = fidelity.load_text(name)
    path = folder / f"{Path(name).name.removesuffix('.xz')}.second"
    path.write_text(text[len(text) // 2 + tokens * facts.CHARACTERS_PER_TOKEN :])
    return path


def compare(options: argparse.Namespace, specs: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Rows by text, length and method, then one row for each method over all of them."""
    requests = fidelity.make_requests(options, str(folder))
    found: dict[tuple[Any, ...], list[dict[str, float]]] = {}
    with ExitStack() as stack:
        dense = stack.enter_context(EngineProcess(MODULE, DENSE, next(iter(specs.values()))))
        sparse = {name: stack.enter_context(EngineProcess(MODULE, SPARSE, spec)) for name, spec in specs.items()}
        for (tokens, text), some in requests.items():
            for request in some:
                dense_ms = dense.ask(request)["ms"]
                for name, engine in sparse.items():
                    reply = {**engine.ask(request), "dense_ms": dense_ms}
                    for key in ((tokens, text, name), (0, ALL, name)):
                        found.setdefault(key, []).append(reply)
    return [
        make_row({"tokens": tokens or ALL, "text": text, "method": name}, prompts)
        for (tokens, text, name), prompts in sorted(found.items(), key=lambda item: item[0][0] or sys.maxsize)
    ]


def make_specs(options: argparse.Namespace, methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: fidelity.make_spec(options, options.chunk, {"method": method}) for name, method in methods.items()}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = fidelity.argument_parser(__doc__, "short prompts, the gate at 512 tokens")
    parser.add_argument("--model", required=True, help="a model directory")
    parser.add_argument("--texts", nargs="+", required=True, help=f"files, or {fidelity.STDLIB!r}, to compare on")
    parser.add_argument("--search-texts", nargs="+", help="files to search with; none given: those of --texts")
    parser.add_argument("--search-options", default="", help="more options of minference-vllm search")
    parser.add_argument("--pattern", type=Path, help="compare this pattern file, without a search")
    parser.add_argument("--keep", type=Path, help="a folder that keeps the pattern file and the search's measurements")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 28672], help="prompt lengths")
    parser.add_argument("--prompts", type=int, default=4, help="prompts a text and length")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.set_defaults(context=None, gpus=1, memory=MEMORY)  # all three engines share one GPU
    return parser.parse_args(arguments)


def main() -> None:
    if serve_requests(start_engine):
        return
    options = parse()
    results.describe_run(options.tiny)
    with tempfile.TemporaryDirectory(prefix="search-") as directory:
        folder = Path(directory)
        known = {"file": options.pattern, "said": "", "seconds": None, "options": ""}
        record = known if options.pattern else search(options, folder)
        file = record.pop("file")
        methods: dict[str, dict[str, Any]] = {DEFAULT: {"name": "block"}}
        if file is not None:
            methods[SEARCHED] = {"name": "auto", "pattern_file": str(file.resolve())}
            record["provenance"] = read_pattern(file).provenance.model_dump()
        specs = make_specs(options, methods)
        settings = fidelity.describe(options, next(iter(specs.values())))
        settings["search"] = record
        settings["sparse"] |= {name: resolved(spec["minference"]) for name, spec in specs.items()}
        settings["ms, dense_ms"] = (
            f"from a request to its first token, the median of {TIMED_READINGS} readings, a mean over prompts"
        )
        rows = compare(options, specs, folder)
    results.write(options.out, rows, options.tiny, settings=settings)
    print(results.table(rows))


if __name__ == "__main__":
    main()
