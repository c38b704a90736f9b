# SPDX-License-Identifier: Apache-2.0
"""Minutes of mixed traffic on a dense and then a sparse server; the exit status is 1 if a limit is exceeded.

    python -m benchmarks.soak --model /tmp/qwen --text austen.txt.xz --minutes 8 --out soak-1.json
    python -m benchmarks.soak --merge soak-1.json soak-2.json --out benchmarks/results/soak.json

The traffic is long and short prompts, streamed answers, clients that hang up during the answer or before its first
token, and requests that must be refused. The limits are in benchmarks/soak/limits.py. Stretches with different seeds
can be merged. Choose a --rate that the dense server keeps up with, as `late` in the result shows: otherwise the faster
server gets more to do.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import DENSE, SPARSE, argument_parser, resolved, results
from benchmarks.fidelity import load_text
from benchmarks.soak import limits
from benchmarks.soak.client import Target
from benchmarks.soak.found import Found
from benchmarks.soak.merge import MergeError, details, make_rows, merge
from benchmarks.soak.schedule import Mix
from benchmarks.soak.traffic import Traffic, drive
from benchmarks.soak.watch import Watch
from demo.server import environment
from minference_vllm.evals import serve

USUAL: dict[str, Any] = {
    "serve": "--max-num-batched-tokens 8192", "minference": "{}", "minutes": 8.0, "clients": 64, "rate": 8.0,
    "short_tokens": [64, 2048], "long_tokens": [17000, 28000], "answer_tokens": [32, 256],
}  # fmt: skip
TINY_USUAL: dict[str, Any] = {
    "serve": "--max-model-len 2048 --max-num-batched-tokens 512 --max-num-seqs 8 --enforce-eager",
    "minference": '{"min_seq_len": 512, "min_chunk": 64}', "minutes": 2.5, "clients": 6, "rate": 0.6,
    "short_tokens": [16, 96], "long_tokens": [600, 900], "answer_tokens": [4, 16],
}  # fmt: skip
SOURCE_TOKENS = 2**20
LEAST_TOKEN = 10  # smaller token ids have a special meaning in many models


def parse() -> argparse.Namespace:
    parser = argument_parser(__doc__, "few clients, prompts of some hundred tokens", compares=False)
    parser.add_argument("--model", help="a directory")
    parser.add_argument(
        "--text", help="a file, as for benchmarks.fidelity, that prompts are cut from; else random tokens"
    )
    parser.add_argument("--dense-url", help="URL of a dense server that runs already; none is then started")
    parser.add_argument("--sparse-url", help="URL of a sparse server that runs already; give both or none")
    parser.add_argument("--logs", type=Path, help="a folder that keeps the servers' logs")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="results of stretches, to merge into one")
    usual = argparse.SUPPRESS
    parser.add_argument(
        "--minutes", type=float, default=usual, help=f"minutes for both servers together; usually {USUAL['minutes']}"
    )
    parser.add_argument("--serve", default=usual, help=f"options of both servers; usually {USUAL['serve']!r}")
    parser.add_argument("--minference", default=usual, help="settings of the sparse server, JSON")
    parser.add_argument("--clients", type=int, default=usual, help=f"usually {USUAL['clients']}")
    parser.add_argument("--rate", type=float, default=usual, help=f"requests a second; usually {USUAL['rate']}")
    for name in ("short", "long", "answer"):
        key = f"{name}_tokens"
        parser.add_argument(f"--{name}-tokens", type=int, nargs=2, default=usual, help=f"usually {USUAL[key]}")
    options = parser.parse_args()
    for name, value in (TINY_USUAL if options.tiny else USUAL).items():
        vars(options).setdefault(name, value)
    if not options.merge and not options.model:
        parser.error("--model is needed, unless results are merged")
    if bool(options.dense_url) != bool(options.sparse_url):
        parser.error("--dense-url and --sparse-url go together")
    return options


def make_source(options: argparse.Namespace) -> list[int]:
    """The tokens that prompts are cut from: the text, repeated if it is short, or random ones."""
    longest = options.long_tokens[1]
    if not options.text:
        config = json.loads(Path(options.model, "config.json").read_text())
        vocab_size = config.get("text_config", config)["vocab_size"]
        drawn = np.random.default_rng(options.seed).integers(LEAST_TOKEN, vocab_size, SOURCE_TOKENS)
        return [int(token) for token in drawn]
    from transformers import AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(options.model).encode(load_text(options.text), add_special_tokens=False)
    return encoded * -(-2 * longest // len(encoded))


def make_target(url: str, source: Sequence[int], traffic: Traffic) -> Target:
    """The target for requests to a server: the one model that it serves, with the model's limit.

    Raises:
        SystemExit: the traffic's requests exceed that limit.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/v1/models", timeout=60) as response:
        [served] = json.load(response)["data"]
    longest = traffic.mix.long_tokens[1] + traffic.mix.answer_tokens[1]
    if longest > served["max_model_len"]:
        raise SystemExit(f"requests have up to {longest} tokens, and {url} takes {served['max_model_len']}")
    return Target(url, served["id"], served["max_model_len"], source)


def soak(options: argparse.Namespace, traffic: Traffic, source: Sequence[int], backend: str, logs: Path) -> Found:
    """Send the traffic to one server."""

    def run(url: str, process: int | None, is_alive: Callable[[], bool]) -> Found:
        has_gpu = process is not None and torch.cuda.is_available()  # else its GPU is not ours
        watch = Watch(url, process, has_gpu)
        return asyncio.run(drive(traffic, make_target(url, source, traffic), backend, watch, is_alive))

    if url := (options.dense_url if backend == DENSE else options.sparse_url):
        return run(url, None, lambda: True)
    arguments = serve.arguments(options.model, options.serve, backend == DENSE)
    if backend == SPARSE:
        arguments += ["--additional-config", json.dumps({"minference": json.loads(options.minference)})]
    with serve.started(arguments, logs / f"{backend}.log", environment(options.model)) as server:
        return run(server.url, server.process.pid, lambda: server.process.poll() is None)


def run_both(options: argparse.Namespace, logs: Path) -> list[str]:
    """Send the traffic to both servers, one after the other; return the limits that are exceeded."""
    ranges = {name: tuple(getattr(options, name)) for name in ("short_tokens", "long_tokens", "answer_tokens")}
    mix = Mix(options.rate, **ranges)
    traffic = Traffic(mix, options.clients, options.minutes * 30, options.seed)
    settings = {
        "model": Path(options.model).name,
        "prompts": f"from {Path(options.text).name}" if options.text else "random token ids",
        "serve": "servers that ran already" if options.dense_url else options.serve,
        "sparse": resolved(json.loads(options.minference)),
        "clients": options.clients,
        "mix": asdict(mix),
        "itl": "time between two events of a stream, as a client sees them; late: after its time a request was sent",
        "memory": "slope by least squares over the second half, with its 95% interval; host: resident memory of all "
        "the server's processes together, gpu: of those in CUDA_VISIBLE_DEVICES, else of all, as nvidia-smi says",
    }
    watched = [] if options.dense_url else ["host", *(["gpu"] if torch.cuda.is_available() else [])]
    extra = {"settings": settings, "limits": limits.as_json(), "watched": watched, "seed": options.seed}
    source, found, faults = make_source(options), {}, ["the sparse server has not run yet"]
    for backend in (DENSE, SPARSE):
        print(f"==> {backend}", flush=True)
        found[backend] = soak(options, traffic, source, backend, logs)
        if backend == SPARSE:
            faults = limits.exceeded(found, tuple(watched))
        rows = make_rows(found, 1)
        print(rows[-1], flush=True)
        results.write(options.out, rows, options.tiny, **extra, exceeded=faults, details=details(found))
    return faults


def main() -> int:
    options = parse()
    if options.merge:
        try:
            faults = merge(options.merge, options.out)
        except MergeError as error:
            sys.exit(str(error))
    else:
        results.describe_run(options.tiny)
        if options.logs:
            faults = run_both(options, options.logs)
        else:
            with tempfile.TemporaryDirectory(prefix="soak-") as logs:
                faults = run_both(options, Path(logs))
    print("\n".join(faults) or "all limits are kept")
    return 1 if faults else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped by SIGTERM."))  # servers are stopped on the way out
    sys.exit(main())
