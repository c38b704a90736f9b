# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm bench`: sends a dense and a sparse server the same load, and says how much faster one is."""

import argparse
import math
from pathlib import Path
from typing import Any

from minference_vllm.cli import servers
from minference_vllm.cli.arguments import count, count_to
from minference_vllm.cli.status import FAILED, INCOMPLETE, NOT_SPARSE, STOPPED
from minference_vllm.errors import ConfigError, shortened

MOST_IN_FLIGHT, MOST_REQUESTS, MOST_WARMUPS, MOST_SEED, MOST_RATE = 4096, 10**6, 10**4, 2**32 - 1, 10**4
INPUT_LENS, OUTPUT_LENS, IN_FLIGHT, REQUESTS, WARMUPS = (8192, 32768), (128,), (1,), 50, 4
SHOWN = (
    "input_len",
    "output_len",
    "load",
    "requests",
    "ttft_dense",
    "ttft_sparse",
    "ttft_speedup",
    "ttft_low",
    "ttft_high",
    "tpot_speedup",
    "e2e_speedup",
    "throughput",
    "sparse_share",
    "density",
)

BENCH = f"""\
Has `vllm bench serve` send the same requests to a dense server and to one of `--attention-backend minference`, one
point of the sweep after the other. Writes both servers' rates, and their times to the first token, between tokens and
to the last token, into report.json and report.html in --out. The servers run already (--dense, --sparse), or are
started here, one after the other (--serve). A run that was cut off goes on where it stopped.
Exit status: 0 all requests are answered; {FAILED} something does not fit, or a server is gone; {NOT_SPARSE} nothing ran
sparse; {INCOMPLETE} some requests failed; {STOPPED} stopped by a signal."""


def bench(options: argparse.Namespace) -> int:
    """Send, compare and report; return the exit status."""
    return servers.run(_bench, options)


def _bench(options: argparse.Namespace) -> int:
    from minference_vllm.bench import run, sender
    from minference_vllm.evals.document import HTML_REPORT

    servers.check(options)
    wanted = _run(options)
    sender.check_sender(wanted.load)
    wanted.servers.check()
    report = run.run(wanted)
    _say(report, options.out / HTML_REPORT)
    if report["warnings"]:
        return NOT_SPARSE
    return INCOMPLETE if report["errors"] else 0


def _run(options: argparse.Namespace) -> Any:
    from minference_vllm.bench import load, run

    further = load.split_options(options.bench)
    has_own_lengths = load.names_dataset(further)
    if has_own_lengths and options.text:
        raise ConfigError(f"--text and {load.DATASET_OPTION} of --bench both name prompts: give one of them.")
    none = (None,) if has_own_lengths else None
    points = load.sweep(
        sorted(set(options.input_len or ())) or none or INPUT_LENS,
        sorted(set(options.output_len or ())) or none or OUTPUT_LENS,
        options.rate or (),
        options.concurrency or (() if options.rate else IN_FLIGHT),
    )
    sent = load.Load(
        requests=options.requests,
        warmups=options.warmups,
        seed=options.seed,
        tokenizer=options.tokenizer or options.model,
        options=further,
        text=options.text,
        folder=options.out,
    )
    return run.Run(servers.pair(options), sent, points, servers.record())


def _say(report: dict[str, Any], page: Path) -> None:
    servers.say_rows(report["rows"], SHOWN)
    print("Times are medians in ms; a speed-up is dense / sparse, throughput is sparse / dense.")
    if report["errors"]:
        first = report["errors"][0]
        print(
            f"{len(report['errors'])} requests failed, and are in no time. The first, request {first['request']} of "
            f"the {first['server']} server at {first['load']}: {first['error']}"
        )
    servers.say_end(report, page)


def _rate(text: str) -> float:
    """A parser of rates, in requests a second."""
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate <= MOST_RATE:
        raise argparse.ArgumentTypeError(f"{shortened(text)} is no number above 0 and up to {MOST_RATE}")
    return rate


def add_parser(commands: Any) -> None:
    """Add this command to those of an argparse parser."""
    command = commands.add_parser("bench", description=BENCH, help="compare a model's latencies, dense and sparse")
    command.set_defaults(run=bench)
    servers.add_options(command, 7200, "one point of the sweep")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder for the measurements and the report")
    sweep = command.add_argument_group("sweep", "Every length is measured at every load.")
    sweep.add_argument(
        "--input-len", type=count, nargs="+", help=f"tokens of a prompt; default: {' '.join(map(str, INPUT_LENS))}"
    )
    sweep.add_argument(
        "--output-len", type=count, nargs="+", help=f"tokens of an answer; default: {' '.join(map(str, OUTPUT_LENS))}"
    )
    sweep.add_argument("--rate", type=_rate, nargs="+", help="requests a second, sent at random times")
    sweep.add_argument(
        "--concurrency", type=count_to(MOST_IN_FLIGHT), nargs="+", help="requests in flight; default: 1, without --rate"
    )
    sweep.add_argument(
        "--requests",
        type=count_to(MOST_REQUESTS),
        default=REQUESTS,
        help=f"requests at each point; default: {REQUESTS}",
    )
    sweep.add_argument(
        "--warmups",
        type=count_to(MOST_WARMUPS, least=0),
        default=WARMUPS,
        help=f"requests of each length that are sent first and not measured; default: {WARMUPS}",
    )
    sweep.add_argument(
        "--seed", type=count_to(MOST_SEED, least=0), default=0, help="seed of prompts and sending times; default: 0"
    )
    prompts = command.add_argument_group("prompts", "Random tokens, unless one of these says otherwise.")
    prompts.add_argument("--text", type=Path, metavar="FILE", help="cut prompts from a long text, plain or .xz")
    prompts.add_argument(
        "--bench", metavar="OPTIONS", default="", help="more options of vllm bench serve, for example --dataset-name"
    )
    prompts.add_argument("--tokenizer", help="directory, or name on the hub; default: --model")
