# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm search`: makes a model's pattern file from texts."""

import argparse
import json
from pathlib import Path
from typing import Any

from minference_vllm import __version__
from minference_vllm.cli.arguments import count, count_to, json_object
from minference_vllm.cli.status import FAILED, STOPPED
from minference_vllm.errors import ConfigError
from minference_vllm.files import refuse_unwritable, write_file

NOT_BETTER = 3
MOST_PROMPTS, MOST_SEED = 1000, 2**31
TOKENS, METHODS = (16384, 28672), ("block", "vertical_slash")
MOST_NAME = 256

SEARCH = f"""\
Starts vLLM in this process and has it read prompts made of texts, half of them to search with and half to check with.
Every candidate (shares of block, sizes of vertical_slash, A-shapes, all keys) attends in every layer beside dense
attention, and is timed. Then one layer at a time runs sparse, to measure what its errors do to the next tokens. The
pattern file that does the least harm in no more than the default method's time is compared with the default on the
other prompts, and written if it is better. The measurements stay in FILE.jsonl, from which the same command goes on.
Exit status: 0 written, {FAILED} not measured, {NOT_BETTER} no better than the default, nothing written, {STOPPED}
stopped."""


def search(options: argparse.Namespace) -> int:
    """Search and write the file; return the exit status."""
    engine = _engine(options)
    if len(options.model) > MOST_NAME:
        raise ConfigError(f"The model's name is longer than the {MOST_NAME} letters that a pattern file holds.")
    refuse_unwritable(options.out, str(options.out))
    import torch  # not for --help

    if options.cost == "time" and not torch.cuda.is_available():
        raise ConfigError(
            "search times candidates on the GPU that will serve, and this machine has none: --cost pairs counts what "
            "they attend to in place of times."
        )
    from minference_vllm.patterns.importer import write

    found = _found(options, engine)
    print(found.verdict.sentence())
    if not found.verdict.is_better:
        print("That is no better than the default, beyond noise and at no more cost: nothing is written.")
        return NOT_BETTER
    write_file(options.out, write(found.file), str(options.out))
    print(f"{options.out} is written. Serve with it: --additional-config '{_settings(options.out)}'")
    return 0


def _found(options: argparse.Namespace, engine: dict[str, Any]) -> Any:
    from minference_vllm.evals.extras import need
    from minference_vllm.evals.private import own_command
    from minference_vllm.patterns.file import Provenance
    from minference_vllm.search import prompts
    from minference_vllm.search.journal import Journal
    from minference_vllm.search.reader import Reader
    from minference_vllm.search.run import Search

    texts = prompts.load_texts(options.data)
    made = prompts.make(options.model, texts, options.tokens, options.prompts, options.seed)
    origin = _origin(options, engine, texts)
    journal = Journal(options.out.with_name(f"{options.out.name}.jsonl"), origin)
    run = Search(Reader(options.model, engine), made, options.methods, options.repeats if options.cost == "time" else 0)
    setting = f"{origin.model}, minference-vllm {origin.version}, vLLM {origin.vllm}, {origin.device}"
    provenance = Provenance(source="minference-vllm search", notes=(own_command()[:1000], setting[:1000]))
    with need("tqdm").tqdm(total=run.num_steps, unit="step", dynamic_ncols=True) as progress:

        def say(done: str) -> None:
            progress.set_description(done)
            progress.total = max(progress.total, progress.n + 1)  # a second check was not foreseen
            progress.update()

        return run.run(options.model, provenance, journal, say)


def _origin(options: argparse.Namespace, engine: dict[str, Any], texts: dict[str, str]) -> Any:
    """The settings that the journal's measurements belong to."""
    import torch

    from minference_vllm.compat import installed_version
    from minference_vllm.evals.material import fingerprint_of
    from minference_vllm.search.candidates import CANDIDATES
    from minference_vllm.search.journal import Origin

    return Origin(
        version=__version__,
        vllm=installed_version(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        model=options.model,
        data=tuple(fingerprint_of(text.encode()) for text in texts.values()),
        tokens=tuple(options.tokens),
        prompts=options.prompts,
        seed=options.seed,
        cost=options.cost,
        engine=json.dumps(engine, sort_keys=True),
        candidates=tuple(json.dumps([name, CANDIDATES[name].heads]) for name in options.methods),
    )


def _engine(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of vllm.LLM."""
    given = json_object("--engine", options.engine)
    return {
        "max_model_len": max(options.tokens) + 1, "max_num_batched_tokens": options.chunk, "max_num_seqs": 1,
        "gpu_memory_utilization": 0.7, **given,
    }  # fmt: skip


def _settings(out: Path) -> str:
    return json.dumps({"minference": {"method": {"name": "auto", "pattern_file": str(out)}}})


def add_parser(commands: Any) -> None:
    """Add this command to those of an argparse parser."""
    command = commands.add_parser("search", description=SEARCH, help="make a model's pattern file")
    command.set_defaults(run=search)
    command.add_argument("model", help="directory, or name on the hub")
    command.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="long texts, plain or .xz, best of the kinds that you serve; default: the sources of Python's library",
    )
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="the pattern file")
    command.add_argument(
        "--tokens",
        type=count,
        nargs="+",
        default=TOKENS,
        help=f"lengths in tokens; default: {' '.join(map(str, TOKENS))}",
    )
    several = count_to(MOST_PROMPTS, least=2)
    command.add_argument(
        "--prompts", type=several, default=6, help="prompts to search with; as many more to check with; default: 6"
    )
    command.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="methods to try; default: both")
    command.add_argument(
        "--cost",
        choices=["time", "pairs"],
        default="time",
        help="cost that must not exceed the default method's; default: time",
    )
    command.add_argument("--repeats", type=count_to(100), default=3, help="timed runs of each candidate; default: 3")
    command.add_argument("--seed", type=count_to(MOST_SEED, least=0), default=0, help="seed of all random choices")
    command.add_argument("--chunk", type=count, default=8192, help="the engine's max_num_batched_tokens")
    command.add_argument("--engine", default="{}", help="more arguments of vllm.LLM, a JSON object")
