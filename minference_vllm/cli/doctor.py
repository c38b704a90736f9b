# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm doctor`: looks at the installation, the machine and the settings before a server does."""

import argparse
import os
from pathlib import Path
from typing import Any

from minference_vllm.cli.arguments import count, json_object
from minference_vllm.config import CONFIG_FILE_VARIABLE

CHECK_FAILED = 1

DOCTOR = f"""\
Looks at versions, GPU, plugin, settings and metrics as a server would find them, runs each kernel against the reference
and, for a model, says which layers may run sparse and whether the gate can open. No weights are read.
Exit status: 0 no check failed, {CHECK_FAILED} one did, 2 wrong usage."""


def doctor(options: argparse.Namespace) -> int:
    """Make all checks and print them; return the exit status."""
    # Set before vLLM is imported, because its log would go to stdout otherwise.
    os.environ.update(VLLM_LOGGING_STREAM="ext://sys.stderr", VLLM_LOGGING_LEVEL="WARNING")
    additional_config = json_object("--additional-config", options.additional_config)
    if options.config:
        os.environ[CONFIG_FILE_VARIABLE] = str(options.config)
    from minference_vllm.doctor import diagnosis
    from minference_vllm.doctor.settings import Limits

    limits = Limits(
        options.max_num_batched_tokens, options.max_model_len, options.kv_cache_dtype, options.tensor_parallel_size
    )
    checks = diagnosis.diagnose(
        dict(os.environ), options.model, limits, additional_config, expects_gpu=not options.no_gpu
    )
    print(diagnosis.to_json(checks) if options.json else "\n".join(diagnosis.to_lines(checks)))
    return CHECK_FAILED if diagnosis.has_failed(checks) else 0


def add_parser(commands: Any) -> None:
    """Add this command to those of an argparse parser."""
    command = commands.add_parser("doctor", description=DOCTOR, help="check installation, machine and settings")
    command.set_defaults(run=doctor)
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--no-gpu", action="store_true", help="skip what needs a GPU, as while an image is built")
    command.add_argument("--model", help="model that would be served: directory, or name on the hub")
    command.add_argument(
        "--config", type=Path, help=f"file of settings, in place of the one that {CONFIG_FILE_VARIABLE} names"
    )
    server = command.add_argument_group("options of the server, as vllm serve takes them")
    server.add_argument("--additional-config", metavar="JSON", default="{}", help='settings under "minference"')
    server.add_argument("--max-num-batched-tokens", type=count)
    server.add_argument("--max-model-len", type=count)
    server.add_argument("--kv-cache-dtype")
    server.add_argument("--tensor-parallel-size", type=count)
