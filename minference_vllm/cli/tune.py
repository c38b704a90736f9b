# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm tune`: finds the gate for a model on this machine."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minference_vllm.cli.arguments import count
from minference_vllm.cli.status import FAILED
from minference_vllm.config import CONFIG_FILE_VARIABLE, MInferenceConfig, load_config
from minference_vllm.errors import ConfigError
from minference_vllm.files import refuse_unwritable
from minference_vllm.tuning.gate import MIN_SPEEDUP, Timing, crossover, write_gate
from minference_vllm.tuning.heads import Heads, of_model

LENGTHS = [1024 * k for k in (4, 8, 16, 24, 32, 48, 64, 96, 128)]
NEVER_WINS = 3

TUNE = f"""\
Times one layer's attention at the end of prompts of growing length, dense (vLLM's FlashAttention) and sparse (this
package's kernels, on random sets of keys), and writes the length from which sparse stays faster into a file of settings
for {CONFIG_FILE_VARIABLE}. Other settings in that file are kept, and used for the measurement.
Exit status: 0 written, {FAILED} not measured, {NEVER_WINS} sparse never wins, nothing written."""


def tune(options: argparse.Namespace) -> int:
    """Measure, decide and write; return the exit status."""
    config = load_config(None, {CONFIG_FILE_VARIABLE: str(options.out)} if os.path.lexists(options.out) else {})
    refuse_unwritable(options.out, str(options.out))
    timings: list[Timing] = []
    for timing in _measure(options, config):
        if not timings:
            print(f"{'tokens':>8} {'dense ms':>9} {'sparse ms':>9} {'speed-up':>9}")
        print(f"{timing.tokens:8} {timing.dense_ms:9.3f} {timing.sparse_ms:9.3f} {timing.speedup:9.2f}", flush=True)
        timings.append(timing)
    gate = crossover(timings)
    if gate is None:
        print(f"At {timings[-1].tokens} tokens sparse is not {MIN_SPEEDUP} times as fast as dense: nothing is written.")
        return NEVER_WINS
    write_gate(options.out, gate)
    print(f"Sparse wins from {gate} tokens on: min_seq_len = {gate} is in {options.out}.")
    print(f"Serve with it: {CONFIG_FILE_VARIABLE}={options.out} vllm serve MODEL --attention-backend minference")
    return 0


def _measure(options: argparse.Namespace, config: MInferenceConfig) -> Iterator[Timing]:
    import torch  # not for --help

    if not torch.cuda.is_available():
        raise ConfigError("tune measures on the GPU that will serve, and this machine has none.")
    from minference_vllm.tuning.timing import measure

    heads = _heads(options)
    cache = f"cache {options.kv_cache_dtype}" if options.kv_cache_dtype != "auto" else "cache as the model"
    run = f"{heads}, {cache}, method {config.method.name}, chunks of {options.chunk}"
    print(f"{run}, {torch.cuda.get_device_name()}")
    device = torch.device("cuda", torch.cuda.current_device())
    lengths, has_fp8_kv = sorted(options.lengths), options.kv_cache_dtype != "auto"
    return measure(heads, config, device, lengths, options.chunk, options.repeats, has_fp8_kv)


def _heads(options: argparse.Namespace) -> Heads:
    given = (options.heads, options.kv_heads, options.head_dim)
    if options.model and not any(given):
        heads = of_model(options.model)
    elif all(given) and not options.model:
        heads = Heads(*given)
    else:
        raise ConfigError("Give --model, or --heads, --kv-heads and --head-dim.")
    return heads.on_rank(options.tensor_parallel_size)


def add_parser(commands: Any) -> None:
    """Add this command to those of an argparse parser."""
    command = commands.add_parser("tune", description=TUNE, help="find min_seq_len for a model on this machine")
    command.set_defaults(run=tune)
    command.add_argument("--model", help="directory, or name on the hub; its config.json has the heads")
    command.add_argument("--heads", type=count, help="query heads, in place of --model")
    command.add_argument("--kv-heads", type=count)
    command.add_argument("--head-dim", type=count)
    command.add_argument("--tensor-parallel-size", type=count, default=1, help="GPUs that share the heads")
    command.add_argument("--chunk", type=count, default=8192, help="the server's --max-num-batched-tokens")
    command.add_argument("--kv-cache-dtype", choices=["auto", "fp8", "fp8_e4m3"], default="auto", help="the server's")
    command.add_argument("--lengths", type=count, nargs="+", default=LENGTHS, help="prompt lengths, in tokens")
    command.add_argument("--repeats", type=count, default=20, help="timed runs at each length")
    out, usual = os.environ.get(CONFIG_FILE_VARIABLE), "minference.json"
    named = f"the file to write; default: the one that {CONFIG_FILE_VARIABLE} names, else {usual}"
    command.add_argument("--out", type=Path, default=out or usual, help=named)
