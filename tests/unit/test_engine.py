# SPDX-License-Identifier: Apache-2.0
"""Which kernels run where, what the log says of it, and what is refused."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minference_vllm import engine, kernels, reference
from minference_vllm.config import ConfigError, MInferenceConfig
from minference_vllm.kernels import cuda
from minference_vllm.kernels.cuda import library
from minference_vllm.workspace import Geometry
from tests.conftest import import_or_skip

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
H100, A100, B200 = (9, 0), (8, 0), (10, 0)
NAMES = {H100: "NVIDIA H100 80GB HBM3", A100: "NVIDIA A100-SXM4-80GB", B200: "NVIDIA B200"}


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    before = engine.logger.level
    engine.logger.addHandler(handler)
    engine.logger.setLevel(logging.INFO)
    yield lines
    engine.logger.setLevel(before)
    engine.logger.removeHandler(handler)


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

    for cached in (library._open, engine.report_head_dim):
        cached.cache_clear()
    yield pretend
    for cached in (library._open, engine.report_head_dim):
        cached.cache_clear()


def load(kernel: str = "auto", device: torch.device = GPU) -> engine.Engine:
    return engine.load_engine(MInferenceConfig(kernel=kernel), device)


def refusal(kernel: str, device: torch.device = GPU) -> str:
    with pytest.raises(ConfigError) as caught:
        load(kernel, device)
    message = str(caught.value)
    assert message.startswith(f"minference.kernel={kernel!r} cannot run here: ")
    assert message.endswith(".")
    assert "\n" not in message
    return message


def test_hopper_with_the_library_takes_cuda(machine: Any, log_lines: list[str]) -> None:
    machine(H100)
    chosen = load()
    assert chosen == engine.Engine("cuda", cuda.probe, kernels.select, kernels.band_lists, cuda.attend)
    assert log_lines == ["INFO MInference: kernel cuda: this is NVIDIA H100 80GB HBM3, compute capability 9.0"]


def test_hopper_without_the_library_takes_triton_and_says_why(machine: Any, log_lines: list[str]) -> None:
    machine(H100, built=False)
    assert load() == engine.Engine("triton", kernels.probe, kernels.select, kernels.band_lists, kernels.attend)
    (line,) = log_lines
    assert line.startswith("INFO MInference: kernel triton: no CUDA library in this installation (built without nvcc")


def test_a_library_that_does_not_load_is_no_library(machine: Any, log_lines: list[str]) -> None:
    machine(H100, broken=True)
    assert load().name == "triton"
    (line,) = log_lines
    assert "the CUDA library cannot be loaded" in line
    assert "_hopper.so" in line


@pytest.mark.parametrize("capability", [A100, B200])
def test_other_gpus_take_triton_whether_or_not_there_is_a_library(
    capability: tuple[int, int], machine: Any, log_lines: list[str]
) -> None:
    machine(capability)
    assert load().name == "triton"
    (line,) = log_lines
    assert NAMES[capability] in line
    assert "H100" in line


def test_no_gpu_takes_the_reference(log_lines: list[str]) -> None:
    chosen = load(device=CPU)
    assert chosen.name == "reference"
    assert chosen.attend is reference.attend
    assert log_lines == ["INFO MInference: kernel reference: no GPU (the device is cpu)"]


@pytest.mark.parametrize("kernel", ["cuda", "triton", "reference"])
def test_what_is_asked_for_and_can_run_runs(kernel: str, machine: Any, log_lines: list[str]) -> None:
    machine(H100)
    assert load(kernel).name == kernel
    assert log_lines == [f"INFO MInference: kernel {kernel}: asked for"]


@pytest.mark.parametrize("kernel", ["auto", "cuda"])
def test_heads_that_the_library_is_not_for_are_named_once(kernel: str, machine: Any, log_lines: list[str]) -> None:
    machine(H100)
    chosen = load(kernel)
    for head_dim in (64, 256, 128, 256):
        engine.report_head_dim(chosen, head_dim)
    assert log_lines[1:] == [
        "INFO MInference: heads of 256 run the Triton kernels (the CUDA library is for 64 and 128)"
    ]


@pytest.mark.parametrize("kernel", ["triton", "reference"])
def test_other_engines_run_heads_of_any_size(kernel: str, machine: Any, log_lines: list[str]) -> None:
    machine(H100)
    engine.report_head_dim(load(kernel), 256)
    assert len(log_lines) == 1


def test_a_layer_names_its_heads_when_it_is_warmed_up(machine: Any, log_lines: list[str]) -> None:
    import_or_skip("vllm")
    from minference_vllm.impl import SparseLayerMixin

    machine(H100)
    layer = SparseLayerMixin()
    layer.runtime = SimpleNamespace(engine=load(), warm_up=lambda *_: None)  # type: ignore[assignment]
    layer.num_kv_heads, layer.head_size, layer._model_dtype = 2, 256, torch.bfloat16
    layer._geometry = Geometry(4, 4096, 4096, 64, 1000)
    layer.warm_up(16)
    assert "heads of 256" in log_lines[-1]


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


@pytest.mark.parametrize("kernel", ["cuda", "triton"])
def test_kernels_without_a_gpu_are_refused(kernel: str) -> None:
    message = refusal(kernel, CPU)
    assert "no GPU (the device is cpu)" in message
    assert "Use 'auto' or 'reference'." in message


def test_the_library_is_opened_once(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(H100)
    opened: list[str] = []
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: opened.append(path) or object())
    assert library.load() is library.load() is not None
    assert library.why_missing() == ""
    assert opened == [str(library.PATH)]


def test_the_library_lies_beside_the_package() -> None:
    assert Path(engine.__file__).with_name("_hopper.so") == library.PATH
