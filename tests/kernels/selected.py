# SPDX-License-Identifier: Apache-2.0
"""Launches compiled Triton kernels on a driver that only notes what it is given: selected by Triton, and repeated.
Prints the names of the kernels if their launches are alike. Run by test_repeats.py; needs no GPU.
"""

import sys
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from minference_vllm.attention import prefill
from minference_vllm.methods import Block
from minference_vllm.methods.block import BlockSettings
from minference_vllm.ops import Kernel
from minference_vllm.repeats import Repeats
from tests.kernels.cases import Case, make_chunk
from tests.kernels.layers import plain
from tests.kernels.test_waits_for_nothing import make_state

CASE = Case("", num_rows=200, context_len=301, dtype=torch.bfloat16, has_sinks=True)
launched: list[tuple[Any, ...]] = []


class Launcher:
    """In place of the function that Triton compiles to launch a kernel."""

    launch_cooperative_grid = False

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        *grid, stream, function, packed, _, _, _ = arguments[:9]
        launched.append((*grid, stream, function, packed, *map(plain, arguments[9:])))


class Utils:
    def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
        return name, name, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}


class Driver:
    utils = Utils()
    launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def take() -> list[tuple[Any, ...]]:
    taken, launched[:] = list(launched), []
    return taken


def select_no_more(kernel: JITFunction, *_: Any, **__: Any) -> None:
    sys.exit(f"{kernel.fn.__name__}: a repeated launch selects its variant anew")


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    method = Block(BlockSettings(), Kernel.TRITON)
    first, second = (make_chunk(CASE, torch.device("cpu")) for _ in range(2))
    second = replace(second, kv=second.kv._replace(block_table=first.kv.block_table))
    state, _ = make_state(CASE, method, torch.device("cpu"))
    prefill(second, method, state)
    alone = take()
    repeats = Repeats()
    repeats.prefill(first, method, state)
    other = take()
    JITFunction.run = select_no_more
    repeats.prefill(second, method, state)
    if take() != alone or other == alone:
        sys.exit("a repeated launch is not the layer's own")
    sys.stdout.write("\n".join(str(function) for *_, function in (launch[:5] for launch in alone)))


if __name__ == "__main__":
    main()
