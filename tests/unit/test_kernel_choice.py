# SPDX-License-Identifier: Apache-2.0
"""Which kernels run where, what the log says of it, and what is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import minference_vllm
from minference_vllm.errors import ConfigError
from minference_vllm.kernels.cuda import library
from minference_vllm.ops import Kernel, choose_kernel, means_dtype, report_shape
from minference_vllm.scratch import FP8, ScratchShape

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
H100, A100, B200 = (9, 0), (8, 0), (10, 0)
NAMES = {H100: "NVIDIA H100 80GB HBM3", A100: "NVIDIA A100-SXM4-80GB", B200: "NVIDIA B200"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Pretend that the GPU is of this capability, and that the library is there, absent or broken."""

    def pretend(capability: tuple[int, int], built: bool = True, broken: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAMES[capability])
        monkeypatch.setattr(library, "PATH", tmp_path / "_hopper.so")
        if built:
            library.PATH.write_bytes(b"no library")
            if not broken:
                monkeypatch.setattr(library.ctypes, "CDLL", lambda path: object())

    library._open.cache_clear()
    yield pretend
    library._open.cache_clear()


def refusal(asked: str, device: torch.device = GPU) -> str:
    with pytest.raises(ConfigError) as caught:
        choose_kernel(asked, device)
    message = str(caught.value)
    assert message.startswith(f"minference.kernel={asked!r} cannot run here: ")
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_hopper_with_the_library_takes_cuda(machine: Any, log_lines: list[tuple[str, str]]) -> None:
    machine(H100)
    assert choose_kernel("auto", GPU) is Kernel.CUDA
    assert log_lines == [("INFO", "MInference: kernel cuda: this is NVIDIA H100 80GB HBM3, compute capability 9.0")]


def test_hopper_without_the_library_takes_triton_and_says_why(machine: Any, log_lines: list[tuple[str, str]]) -> None:
    machine(H100, built=False)
    assert choose_kernel("auto", GPU) is Kernel.TRITON
    ((level, line),) = log_lines
    assert level == "INFO"
    assert line.startswith("MInference: kernel triton: no CUDA library in this installation (built without nvcc")


def test_a_library_that_does_not_load_is_no_library(machine: Any, log_lines: list[tuple[str, str]]) -> None:
    machine(H100, broken=True)
    assert choose_kernel("auto", GPU) is Kernel.TRITON
    ((_, line),) = log_lines
    assert "the CUDA library cannot be loaded" in line
    assert "_hopper.so" in line


@pytest.mark.parametrize("capability", [A100, B200])
def test_other_gpus_take_triton_whether_or_not_there_is_a_library(
    capability: tuple[int, int], machine: Any, log_lines: list[tuple[str, str]]
) -> None:
    machine(capability)
    assert choose_kernel("auto", GPU) is Kernel.TRITON
    ((_, line),) = log_lines
    assert NAMES[capability] in line
    assert "H100" in line


def test_no_gpu_takes_the_reference(log_lines: list[tuple[str, str]]) -> None:
    assert choose_kernel("auto", CPU) is Kernel.REFERENCE
    assert log_lines == [("INFO", "MInference: kernel reference: no GPU (the device is cpu)")]


@pytest.mark.parametrize("asked", Kernel)
def test_what_is_asked_for_and_can_run_runs(asked: Kernel, machine: Any, log_lines: list[tuple[str, str]]) -> None:
    machine(H100)
    assert choose_kernel(asked.value, GPU) is asked
    assert log_lines == [("INFO", f"MInference: kernel {asked}: asked for")]


def test_cuda_without_the_library_is_refused(machine: Any) -> None:
    machine(H100, built=False)
    message = refusal("cuda")
    assert "no CUDA library" in message
    assert "MINFERENCE_BUILD_CUDA=1" in message
    assert "Use 'auto' or 'triton'." in message


def test_cuda_on_another_gpu_is_refused(machine: Any) -> None:
    machine(A100)
    message = refusal("cuda")
    assert NAMES[A100] in message
    assert "MINFERENCE_BUILD_CUDA" not in message


@pytest.mark.parametrize("asked", ["cuda", "triton"])
def test_kernels_without_a_gpu_are_refused(asked: str) -> None:
    message = refusal(asked, CPU)
    assert "no GPU (the device is cpu)" in message
    assert "Use 'auto' or 'reference'." in message


def shape_of(head_dim: int, dtype: torch.dtype = torch.bfloat16, **fp8: bool) -> ScratchShape:
    return ScratchShape(32, 8, head_dim, dtype, max_seq_len=4096, max_chunk=1024, **fp8)


@pytest.mark.parametrize(
    ("shape", "what", "why"),
    [
        (shape_of(64, has_fp8_kv=True, has_fp8_q=True), "for the probe of", "these have 64"),
        (shape_of(64, has_fp8_kv=True), "for", "these are in torch.bfloat16"),
        (shape_of(256), "for", "these have 256"),
        (shape_of(256, has_fp8_kv=True, has_fp8_q=True), "for", "these have 256"),
    ],
    ids=["FP8 cache of 64", "FP8 cache under other queries", "head_dim 256", "head_dim 256, FP8"],
)
@pytest.mark.parametrize(("asked", "level"), [("auto", "INFO"), ("cuda", "WARNING")])
def test_layers_that_the_cuda_kernels_are_not_made_for_are_named(
    shape: ScratchShape, what: str, why: str, asked: str, level: str, log_lines: list[tuple[str, str]]
) -> None:
    report_shape(Kernel.CUDA, asked, shape)
    ((logged, line),) = log_lines
    assert logged == level
    assert line.startswith(f"MInference: kernel triton instead of cuda {what} ScratchShape(")
    assert line.endswith(why)


def test_nothing_is_said_of_layers_that_run_as_chosen(log_lines: list[tuple[str, str]]) -> None:
    report_shape(Kernel.CUDA, "cuda", shape_of(128))
    report_shape(Kernel.CUDA, "cuda", shape_of(128, has_fp8_kv=True, has_fp8_q=True))
    for kind in (Kernel.TRITON, Kernel.REFERENCE):
        report_shape(kind, kind.value, shape_of(256, has_fp8_kv=True))
    assert log_lines == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_in_fp8_where_that_is_faster(dtype: torch.dtype, machine: Any) -> None:
    machine(H100)
    assert means_dtype("auto", shape_of(128, dtype), Kernel.CUDA, GPU) == FP8
    for head_dim, kind in ((64, Kernel.CUDA), (256, Kernel.CUDA), (128, Kernel.TRITON), (128, Kernel.REFERENCE)):
        assert means_dtype("auto", shape_of(head_dim, dtype), kind, GPU) == dtype
    assert means_dtype("auto", shape_of(128, torch.float32), Kernel.CUDA, GPU) == torch.float32


@pytest.mark.parametrize("kind", Kernel)
def test_scores_are_in_the_dtype_that_is_asked_for(kind: Kernel, machine: Any) -> None:
    machine(H100)
    for head_dim in (64, 128, 256):
        assert means_dtype("fp8", shape_of(head_dim), kind, GPU) == FP8
        assert means_dtype("model", shape_of(head_dim), kind, GPU) == torch.bfloat16


def test_fp8_on_a_gpu_that_has_none_is_refused(machine: Any) -> None:
    machine(A100)
    assert means_dtype("auto", shape_of(128), Kernel.TRITON, GPU) == torch.bfloat16
    assert means_dtype("fp8", shape_of(128), Kernel.REFERENCE, GPU) == FP8
    assert means_dtype("fp8", shape_of(128), Kernel.TRITON, CPU) == FP8
    with pytest.raises(ConfigError, match="score_dtype='fp8' cannot run here: there is no FP8 on NVIDIA A100"):
        means_dtype("fp8", shape_of(128), Kernel.TRITON, GPU)


def test_the_library_is_opened_once(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(H100)
    opened: list[str] = []
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: opened.append(path) or object())
    assert library.load() is library.load() is not None
    assert library.why_missing() == ""
    assert opened == [str(library.PATH)]


def test_the_library_lies_beside_the_package() -> None:
    assert Path(minference_vllm.__file__).with_name("_hopper.so") == library.PATH
