# SPDX-License-Identifier: Apache-2.0
"""A chunk that runs sparse only launches: the host waits for nothing that the GPU has yet to compute, and nothing is
allocated."""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from minference_vllm.attention import Guard, LayerState, prefill
from minference_vllm.chunk import Chunk
from minference_vllm.kernels.cuda import library
from minference_vllm.methods import Block, Method, VerticalSlash
from minference_vllm.methods.block import BlockSettings
from minference_vllm.methods.vertical_slash import VerticalSlashSettings
from minference_vllm.metrics.density import DensityMeter
from minference_vllm.metrics.recall_meter import RecallMeter
from minference_vllm.ops import Kernel
from minference_vllm.recall import Floors
from minference_vllm.scratch import AttendBuffers, RecallBuffers, RecallTotals
from tests.kernels.cases import Case, make_chunk

METHODS: dict[str, Callable[[Kernel], Method]] = {
    "block": lambda kernel: Block(BlockSettings(), kernel),
    "block, boxes first": lambda kernel: Block(BlockSettings(coarse_from=0), kernel),
    "vertical_slash": lambda kernel: VerticalSlash(VerticalSlashSettings(probe_rows="both"), kernel),
    "a share": lambda kernel: VerticalSlash(VerticalSlashSettings(share=0.9), kernel),
}
every_method = pytest.mark.parametrize("make_method", METHODS.values(), ids=METHODS)
PLAIN = Case("", num_rows=9000, context_len=1001, head_dim=128, dtype=torch.bfloat16)
IN_FP8 = replace(PLAIN, has_fp8_kv=True, has_fp8_q=True)
VIEWS = {"alias", "detach", "device", "expand", "select", "slice", "unbind", "view"}
WRITES = {"copy_", "zero_"}
"""Operations that write: a copy from one tensor on the device to another, and zeros."""


def make_state(case: Case, method: Method, device: torch.device) -> tuple[LayerState, Guard]:
    heads = case.num_qo_heads
    guard = Guard(Floors(0.7, 0.15), RecallBuffers.allocate(heads, device), RecallTotals.allocate(2, heads, device))
    attend, budgets = AttendBuffers.allocate(heads, case.num_rows, device), method.budgets(heads, device)
    return LayerState(0, budgets, method.scratch(case.shape, device), attend, guard), guard


class Operations(TorchDispatchMode):
    """Records every operation of torch. On fake tensors, one that waits for a number raises, as they hold none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def replace_kernels(monkeypatch: pytest.MonkeyPatch, stand_in: Callable[[str], Any]) -> None:
    """Put what `stand_in` makes of its name in place of every Triton kernel."""
    for name, module in list(sys.modules.items()):
        if name.startswith("minference_vllm.kernels.triton."):
            for kernel in [each for each in vars(module) if each.endswith("_kernel")]:
                monkeypatch.setattr(module, kernel, stand_in(kernel))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called; none is launched."""
    launched: list[str] = []
    replace_kernels(monkeypatch, lambda kernel: Launched(kernel, launched))
    monkeypatch.setattr(library, "enqueue", lambda function, *_: launched.append(function))
    monkeypatch.setattr(library, "num_multiprocessors", lambda _: 132)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda _: 4096, raising=False)
    return launched


class Launched:
    """Stands in for a Triton kernel."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self._name, self._launched = name, launched

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: self._launched.append(self._name)


@every_method
@pytest.mark.parametrize("kernel", [Kernel.TRITON, Kernel.CUDA])
@pytest.mark.parametrize("case", [PLAIN, IN_FP8], ids=["bf16", "fp8"])
def test_torch_only_writes_what_is_there(
    case: Case, kernel: Kernel, make_method: Callable[[Kernel], Method], launches: list[str]
) -> None:
    chunk: Chunk = replace(make_chunk(case, torch.device("cpu")), may_end_prompt=True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(getattr(chunk, name)) for name in ("q", "out")}
        method = make_method(kernel)
        state, _ = make_state(case, method, torch.device("cpu"))
        with Operations() as operations:
            prefill(replace(chunk, **fake), method, state)
    assert operations.names <= VIEWS | WRITES
    assert any("attend" in name for name in launches) and launches.count("_recall_kernel") == 2


@pytest.mark.gpu
@every_method
@pytest.mark.parametrize("kernel", [Kernel.TRITON, pytest.param(Kernel.CUDA, marks=pytest.mark.hopper)])
@pytest.mark.parametrize("case", [PLAIN, IN_FP8], ids=["bf16", "fp8"])
def test_on_a_gpu_nothing_waits_and_nothing_is_allocated(
    case: Case, kernel: Kernel, make_method: Callable[[Kernel], Method], device: torch.device
) -> None:
    chunk: Chunk = replace(make_chunk(case, device), may_end_prompt=True)
    method = make_method(kernel)
    state, guard = make_state(case, method, device)
    density, recall = DensityMeter(state.attend.kept_pairs), RecallMeter(guard.totals)

    def run() -> None:
        prefill(chunk, method, state)
        density.copy(chunk.num_qo_heads * chunk.causal_pairs)
        recall.copy()

    for _ in range(2):  # the first runs may wait for kernels to be compiled and loaded
        run()
    torch.cuda.synchronize()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations
