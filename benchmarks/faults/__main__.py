# SPDX-License-Identifier: Apache-2.0
"""What a server does when something breaks under it, with the plugin and without; the exit status is 1 if it does not
do what is promised.

    python -m benchmarks.faults --model models/SmolLM2-135M-Instruct --out benchmarks/results/faults.json

In parts that are then merged:

    python -m benchmarks.faults --model /tmp/qwen --cases 'a kernel raises once' 'engine killed' … --out a.json
    python -m benchmarks.faults --model /tmp/qwen --cases 'NaN, debug on' … --out b.json
    python -m benchmarks.faults --merge a.json b.json --out benchmarks/results/faults.json

If other jobs use the card: --serve '… --gpu-memory-utilization 0.15 --kv-cache-memory-bytes 2000000000'.

Faults are injected from outside (benchmarks/faults/injection.py); benchmarks/faults/cases.py says what is promised.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import DENSE, SPARSE, argument_parser, resolved, results
from benchmarks.faults import answers, trial
from benchmarks.faults.answers import Answer
from benchmarks.faults.cases import CASES, SETTINGS, Case, Outcome
from benchmarks.faults.injection import Fault
from benchmarks.faults.promises import broken
from benchmarks.faults.server import Trial
from benchmarks.faults.trial import Finding

TEXT = results.ROOT / "demo" / "haystack.txt"
SERVE = "--max-model-len 8192 --max-num-batched-tokens 1024 --max-num-seqs 8 --enforce-eager"
NOTHING = Case("nothing breaks", Outcome.GOES_ON, Outcome.GOES_ON)


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__, "nothing else changes: name a small model", compares=False)
    parser.add_argument("--model", help="model directory; the model must continue a text that repeats itself")
    parser.add_argument("--serve", default=SERVE, help="options of both servers")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help="cases to run")
    parser.add_argument("--logs", type=Path, help="a new folder, which keeps the servers' logs")
    parser.add_argument("--merge", type=Path, nargs="+", help="run nothing, but merge the rows of these files")
    options = parser.parse_args()
    if not (options.merge or options.model):
        parser.error("name a --model, or files to --merge")
    return options


def control(options: argparse.Namespace, text: str, folder: Path) -> list[Answer]:
    """What stock vLLM answers when nothing breaks."""
    server = Trial(options.model, options.serve, NOTHING, is_dense=True, folder=folder)
    with server.running() as running:
        found = answers.ask_all(running.url, options.model, text, with_leads=True)
    if refused := [answer for answer in found if answer.status != answers.OK]:
        sys.exit(f"Stock vLLM does not answer: {refused[0].error}")
    if (least := min(answer.sure for answer in found)) < answers.FEWEST_SURE:
        sys.exit(
            f"{options.model} is sure of {least} tokens of an answer: name a model that goes on with a text it has read"
        )
    return found


def run_all(options: argparse.Namespace, folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each server. The file is written after each row."""
    text = TEXT.read_text()
    print("==> stock vLLM, nothing breaks", flush=True)
    expected = control(options, text, folder / "control")
    settings["sure_tokens"] = [answer.sure for answer in expected]
    rows: list[dict[str, Any]] = []
    stock: dict[tuple[Fault | None, str], Finding] = {}

    def observe(name: str, is_dense: bool) -> Finding:
        case, backend = CASES[name], DENSE if is_dense else SPARSE
        print(f"==> {name}, {backend}", flush=True)
        here = folder / f"{list(CASES).index(name)}-{backend}"
        return trial.run(Trial(options.model, options.serve, case, is_dense, here), text, expected)

    for name in options.cases:
        case = CASES[name]
        beside = None
        if case.stock is not None:
            # Cases that differ only in the plugin's settings are the same case for stock vLLM.
            same = case.fault, case.act
            beside = stock[same] = stock.get(same) or observe(name, is_dense=True)
        ours = observe(name, is_dense=False)
        for backend, found in ((DENSE, beside), (SPARSE, ours)):
            if found is not None:
                faults = broken(case, backend == DENSE, found, beside)
                rows.append({"case": name, "backend": backend, **found.row(), "broken": "; ".join(faults)})
                print(rows[-1], flush=True)
        results.write(options.out, rows, options.tiny, settings=settings)
    return rows


def runnable(cases: Sequence[str], has_gpu: bool) -> list[str]:
    """The cases that have something to break on such a machine."""
    return [name for name in cases if has_gpu or not CASES[name].needs_gpu]


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of the cases that are asked for and can run here.

    Raises:
        SystemExit: none of them can.
    """
    asked, options.cases = options.cases, runnable(options.cases, torch.cuda.is_available())
    for name in asked:
        if name not in options.cases:
            print(f"==> {name}: left out, there is no GPU", flush=True)
    if not options.cases:
        sys.exit("Nothing is measured: each of these cases needs a GPU, and there is none.")
    results.describe_run(options.tiny)
    settings: dict[str, Any] = {
        "model": Path(options.model).name,
        "serve": options.serve,
        "stock": "vLLM with no plugin loaded but, where attention is to fail, the one that makes it fail",
        "sparse": resolved(SETTINGS),
        "answers": f"{answers.ANSWER_TOKENS} greedy tokens after {len(answers.LONG_STARTS)} prompts above the gate and "
        "one below, one at a time; equal: to those of stock vLLM when nothing breaks, up to its first token that is "
        "not three times as likely as the next",
        "broken": "what was promised and is not so; empty if all is",
        **{name: case.how for name, case in CASES.items()},
    }
    if options.logs:
        return run_all(options, options.logs, settings)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        return run_all(options, Path(folder), settings)


def merge(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of several result files, put together in one.

    Raises:
        SystemExit: they are no parts of one run, or do not hold each case that can run on their machine exactly once.
    """
    merged = results.merge_or_exit(options.merge)
    found = [row["case"] for row in merged.rows if row["backend"] == SPARSE]
    if sorted(found) != sorted(runnable(list(CASES), merged.run["gpu"] != results.NO_GPU)):
        raise SystemExit(f"the parts must hold each case once, they hold {', '.join(found)}")
    return merged.write(options.out)


def main() -> int:
    options = parse()
    rows = merge(options) if options.merge else run(options)
    failed = [row for row in rows if row["broken"]]
    for row in failed:
        print(f"{row['case']}, {row['backend']}: {row['broken']}")
    print(f"{len(rows)} servers, {len(failed)} of them not as promised")
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped by SIGTERM."))  # servers are stopped on the way out
    sys.exit(main())
