# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm eval`: asks a dense and a sparse server the same, and says what differs."""

import argparse
from pathlib import Path
from typing import Any

from minference_vllm.cli import servers
from minference_vllm.cli.arguments import count, count_to
from minference_vllm.cli.status import FAILED, INCOMPLETE, NOT_SPARSE, STOPPED
from minference_vllm.errors import ConfigError

MOST_IN_FLIGHT, MOST_SAMPLES, MOST_SEED = 1024, 10**6, 2**63 - 1
TOKENS, SAMPLES, SEED = (8192, 16384, 32768), 20, 0
PREPARING = ("tasks", "tokens", "samples", "seed", "tokenizer", "chat", "text", "prompts")
SHOWN = (
    "task",
    "tokens",
    "samples",
    "errors",
    "dense_score",
    "sparse_score",
    "loss",
    "low",
    "high",
    "density",
    "recall",
)

EVAL = f"""\
Asks a dense server and one of `--attention-backend minference` the same prompts, greedily, scores both, pairs the
scores sample by sample, and writes report.json and report.html into --out. The servers run already (--dense,
--sparse), or are started here, one after the other (--serve). A third server that keeps every key (--control,
--serve-control) shows what rounding alone changes. A run that was cut off goes on where it stopped.
Exit status: 0 all samples are answered; {FAILED} something does not fit, or a server is gone; {NOT_SPARSE} nothing ran
sparse; {INCOMPLETE} some samples have an error in place of an answer; {STOPPED} stopped by a signal."""


def evaluate(options: argparse.Namespace) -> int:
    """Prepare, ask and report; return the exit status."""
    return servers.run(_evaluate, options)


def _evaluate(options: argparse.Namespace) -> int:
    from minference_vllm.evals import document, run

    _check(options)
    if options.prepare:
        prepared = _prepare(options, options.prepare)
        _say_left_out(prepared.header.left_out)
        print(f"{len(prepared.samples)} samples are in {options.prepare}: give it as --prepared.")
        return 0
    wanted = run.Run(servers.pair(options), options.concurrency, servers.record(), options.above)
    wanted.servers.check()
    prepared = _prepare(options, options.out)
    _say_left_out(prepared.header.left_out)
    report = run.evaluate(wanted, prepared)
    known = prepared.header.left_out
    _say_left_out({name: why for name, why in report["left_out"].items() if name not in known})
    _say(report, options.out / document.HTML_REPORT)
    if report["warnings"]:
        return NOT_SPARSE
    return INCOMPLETE if report["errors"] else 0


def _check(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other."""
    prepares = bool(options.prepare)
    servers.check(options, prepares, ", or --prepare", needs_model=not (prepares and options.tokenizer))
    given = [f"--{name}" for name in PREPARING if getattr(options, name) is not None]
    if options.prepared and (prepares or given):
        raise ConfigError(f"--prepared takes samples as they were made: leave out {', '.join(given or ['--prepare'])}.")


def _prepare(options: argparse.Namespace, folder: Path) -> Any:
    from minference_vllm.evals import prepare

    if options.prepared:
        return prepare.load(options.prepared)
    request = prepare.Request(
        tokenizer=options.tokenizer or options.model,
        tasks=options.tasks or (),
        tokens=sorted(set(options.tokens or TOKENS)),
        samples=options.samples or SAMPLES,
        seed=SEED if options.seed is None else options.seed,
        chat=bool(options.chat),
        text=options.text,
        prompts=options.prompts,
    )
    return prepare.prepare(request, folder)


def _say_left_out(left_out: dict[str, str]) -> None:
    for name, why in left_out.items():
        print(f"Left out: {name} ({why}).")


def _say(report: dict[str, Any], page: Path) -> None:
    from minference_vllm.evals.page import mean_row

    shown = (*SHOWN, "control_loss") if "control" in report["settings"] else SHOWN
    servers.say_rows([*report["rows"], *mean_row(report, shown)], shown)
    if report["errors"]:
        first = report["errors"][0]
        print(
            f"{len(report['errors'])} replies are errors, and in no score. The first, {first['id']}: {first['error']}"
        )
    servers.say_end(report, page)


def add_parser(commands: Any) -> None:
    """Add this command to those of an argparse parser."""
    command = commands.add_parser("eval", description=EVAL, help="compare a model's answers, dense and sparse")
    command.set_defaults(run=evaluate)
    asked = servers.add_options(command, 1800, "one answer")
    asked.add_argument("--control", metavar="URL", help="URL of a third server, to compare with the dense one too")
    asked.add_argument(
        "--serve-control",
        metavar="OPTIONS",
        default="",
        help="start a third server: --serve, with this --additional-config in place of the sparse one's",
    )
    asked.add_argument("--concurrency", type=count_to(MOST_IN_FLIGHT), default=4, help="requests in flight; default: 4")
    command.add_argument("--out", type=Path, metavar="DIR", help="folder for the replies and the report")
    command.add_argument(
        "--above", type=count_to(99, least=0), metavar="PERCENT",
        help="leave out tasks and lengths on which the dense server scores no more than this",
    )  # fmt: skip
    prompts = command.add_argument_group("prompts")
    prompts.add_argument("--tasks", nargs="+", help="names of tasks; default: all whose inputs are given")
    prompts.add_argument(
        "--tokens", type=count, nargs="+", help=f"lengths in tokens; default: {' '.join(map(str, TOKENS))}"
    )
    prompts.add_argument(
        "--samples", type=count_to(MOST_SAMPLES), help=f"samples of each task and length; default: {SAMPLES}"
    )
    prompts.add_argument(
        "--seed", type=count_to(MOST_SEED, least=0), help=f"seed of all random choices; default: {SEED}"
    )
    prompts.add_argument(
        "--text", type=Path, metavar="FILE", help="a long text, plain or .xz, for the tasks needle, facts and position"
    )
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="your own prompts, JSONL, for the task agreement")
    prompts.add_argument("--tokenizer", help="directory, or name on the hub; default: --model")
    prompts.add_argument("--chat", action="store_true", default=None, help="put questions into the chat template")
    prompts.add_argument("--prepare", type=Path, metavar="DIR", help="only make the samples, for a later --prepared")
    prompts.add_argument("--prepared", type=Path, metavar="DIR", help="use samples that --prepare made")
