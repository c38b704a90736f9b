# SPDX-License-Identifier: Apache-2.0
"""How long a sparse layer keeps the host, by itself and repeating an earlier one (minference_vllm/repeats.py).

    python -m benchmarks.host --out benchmarks/results/h100-host.json
    python -m benchmarks.host --without-launches --out benchmarks/results/cpu-host.json

The host's time for the layers of one step, by layer, while the GPU has nothing else to do. With --without-launches
kernels are described but not launched, which needs no GPU: what is left is the time that Python takes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from benchmarks import results
from minference_vllm.attention import LayerState, prefill
from minference_vllm.chunk import Chunk, PagedKV
from minference_vllm.kernels.cuda import library
from minference_vllm.methods import Block, Method
from minference_vllm.methods.block import BlockSettings
from minference_vllm.ops import Kernel
from minference_vllm.repeats import Repeats
from minference_vllm.scratch import ScratchShape
from minference_vllm.tuning.heads import Heads
from minference_vllm.tuning.timing import make_state

SHAPES = {"14 / 2 heads of 64": Heads(14, 2, 64), "32 / 8 heads of 128": Heads(32, 8, 128)}
CHUNK, CONTEXT, PAGE_SIZE = 8192, 16384, 16
LAYERS = 24
STEPS, TINY_STEPS = 200, 2
MULTIPROCESSORS = 132  # an H100's, where there is no GPU to ask

Prefill = Callable[[Chunk, Method, LayerState], object]


class Step:
    """The layers of a step, each over a cache of its own."""

    def __init__(self, heads: Heads, device: torch.device) -> None:
        self.method = Block(BlockSettings(), Kernel.CUDA)
        shape = ScratchShape(*heads, torch.bfloat16, CONTEXT + CHUNK, CHUNK)
        self.state = make_state(self.method, shape, device)
        pages = (CONTEXT + CHUNK) // PAGE_SIZE
        self.table = torch.arange(pages, dtype=torch.int32, device=device)[None]
        made = dict(dtype=torch.bfloat16, device=device)
        self.q = torch.randn(CHUNK, heads.num_qo_heads, heads.head_dim, **made)
        self.out = torch.empty_like(self.q)
        self.caches = [
            torch.randn(pages, heads.num_kv_heads, PAGE_SIZE, 2 * heads.head_dim, **made) for _ in range(LAYERS)
        ]

    def chunks(self) -> Iterator[Chunk]:
        """The chunk of each layer, made as an attention layer makes it."""
        for cache in self.caches:
            k, v = cache.split(cache.shape[-1] // 2, dim=-1)
            kv = PagedKV(k, v, self.table, 0)
            yield Chunk(self.q[:CHUNK], self.out[:CHUNK], kv, CONTEXT, 0.1, may_end_prompt=False)

    def host_us(self, run: Prefill) -> float:
        """Microseconds of the host, by layer."""
        if self.q.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for chunk in self.chunks():
            run(chunk, self.method, self.state)
        return 1e6 * (time.perf_counter() - start) / LAYERS


@contextmanager
def no_launches() -> Iterator[None]:
    """Kernels are described but not launched."""
    with (
        mock.patch.object(library, "enqueue", lambda *_: None),
        mock.patch.object(library, "num_multiprocessors", lambda _: MULTIPROCESSORS),
        mock.patch.object(JITFunction, "run", lambda *_, **__: None),
    ):
        yield


def measure(name: str, device: torch.device, steps: int) -> dict[str, Any]:
    """A row for layers of one shape: medians over the steps, which alternate."""
    step = Step(SHAPES[name], device)
    alone, repeated = [], []
    for _ in range(steps + 2):  # the first two warm up
        alone.append(step.host_us(prefill))
        repeated.append(step.host_us(Repeats().prefill))
    return {
        "heads": name,
        "layers": LAYERS,
        "alone_us": round(statistics.median(alone[2:]), 1),
        "repeated_us": round(statistics.median(repeated[2:]), 1),
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the result file")
    parser.add_argument("--without-launches", action="store_true", help="describe kernels only; needs no GPU")
    parser.add_argument("--tiny", action="store_true", help="smoke test: few steps")
    options = parser.parse_args()
    results.describe_run(needs_gpu=not options.without_launches)
    settings = {
        "us": "host time of all layers of a step by their number, from before the first chunk is described; median",
        "repeated": "the step's first layer is recorded, the others repeat it; its time counts",
        "launches": "left out: Python alone"
        if options.without_launches
        else "made, on a GPU that has nothing else to do",
        "chunk": f"{CHUNK} rows after {CONTEXT} keys, pages of {PAGE_SIZE}, bf16, method block, recall measured",
    }
    steps = TINY_STEPS if options.tiny else STEPS
    if options.without_launches:
        with no_launches():
            rows = [measure(name, torch.device("cpu"), steps) for name in SHAPES]
    else:
        rows = [measure(name, torch.device("cuda", torch.cuda.current_device()), steps) for name in SHAPES]
    results.write(options.out, rows, needs_gpu=not options.without_launches, settings=settings)
    print(results.table(rows))


if __name__ == "__main__":
    main()
