# SPDX-License-Identifier: Apache-2.0
"""What a fork server imports before it forks processes of vLLM, see forked.py; and what these pass on to their own.

vLLM asks for processes that Python spawns, and each would import all this again: twelve seconds of CPU. Here it gets
processes of the fork server. As a spawned process they inherit environment, output and process group of who asks.
"""

import multiprocessing.context
import os
from multiprocessing import forkserver, resource_tracker, spawn
from typing import Any

import vllm.entrypoints.cli.main
import vllm.entrypoints.cli.serve
import vllm.entrypoints.launchers.api_server.entry
import vllm.model_executor.models.llama
import vllm.v1.engine.async_llm
import vllm.v1.engine.coordinator
import vllm.v1.engine.core
import vllm.v1.executor.multiproc_executor
import vllm.v1.worker.cpu_worker  # noqa: F401
from prometheus_client import values

STANDARD_OUTPUT, STANDARD_ERROR = 1, 2
_describe, _prepare = spawn.get_preparation_data, spawn.prepare
_output = os.devnull


def write_to(path: str) -> None:
    """Send the output of this process, and of those that it starts, to the end of a file."""
    global _output
    _output = path
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, STANDARD_OUTPUT)
    os.dup2(file, STANDARD_ERROR)
    os.close(file)


def describe(name: str) -> dict[str, Any]:
    """For a process that this one starts."""
    return {**_describe(name), "environ": dict(os.environ), "output": _output, "group": os.getpgrp()}


def prepare(data: dict[str, Any]) -> None:
    """In a process that has been started, before it does what it is for."""
    if "group" in data:
        os.setpgid(0, data["group"])
        write_to(data["output"])
        os.environ.clear()
        os.environ.update(data["environ"])
        # Whether values are shared by several API servers is a variable of the environment, too.
        values.ValueClass = values.get_value_class()
    # The main module of who asks: pytest, or the fork server. Nothing of it is needed.
    _prepare({name: value for name, value in data.items() if not name.startswith("init_main")})


spawn.get_preparation_data, spawn.prepare = describe, prepare
# Python 3.11 would start another fork server, which has imported nothing.
forkserver._forkserver.ensure_running = resource_tracker.ensure_running  # type: ignore[method-assign]
multiprocessing.context._concrete_contexts["spawn"] = multiprocessing.context._concrete_contexts["forkserver"]
