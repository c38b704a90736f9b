# SPDX-License-Identifier: Apache-2.0
"""The versions of the software that a server runs with."""

import ctypes
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from minference_vllm import __version__, compat
from minference_vllm.doctor.check import NO_GPU, Check, failed, ok, skipped

NVML = "libnvidia-ml.so.1"
"""NVIDIA's driver library, which says its version; vLLM finds its GPUs through it too."""


def check_versions(expects_gpu: bool = True) -> Iterator[Check]:
    """The versions. Only vLLM's can be wrong, and the driver's can be missing where a GPU is expected."""
    yield ok("minference-vllm", __version__)
    yield ok("python", platform.python_version())
    yield _check_vllm()
    yield ok("torch", torch.__version__)
    yield _check_triton()
    if torch.version.cuda is None:
        yield skipped("cuda", "PyTorch is built without CUDA")
        yield skipped("driver", "PyTorch is built without CUDA")
    else:
        yield ok("cuda", f"{torch.version.cuda}, which PyTorch is built for")
        yield _check_driver() if expects_gpu else skipped("driver", NO_GPU)


def _check_vllm() -> Check:
    installed = compat.installed_version()
    if compat.is_tested(installed):
        return ok("vllm", installed)
    newest = ".".join(map(str, compat.TESTED[-1]))
    found = f"{installed}; tested are {compat.tested_versions()}"
    return failed("vllm", found, f"Install a tested one: pip install 'vllm=={newest}.*'")


def _check_triton() -> Check:
    try:
        return ok("triton", version("triton"))
    except PackageNotFoundError:
        return failed("triton", "not installed", "Install what vLLM asks for: pip install triton")


def _check_driver() -> Check:
    try:
        driver, cuda = _driver_version()
    except OSError as error:
        remedy = "Install NVIDIA's driver, or let the container have the GPUs (docker run --gpus all)"
        return failed("driver", f"none that can be asked: {error}", remedy)
    return ok("driver", f"{driver}, for CUDA up to {cuda}")


def _driver_version() -> tuple[str, str]:
    """Version of the driver, and the newest CUDA that it runs.

    Raises:
        OSError: there is no driver here, or it does not answer.
    """
    library = ctypes.CDLL(NVML)
    if code := library.nvmlInit_v2():
        raise OSError(f"{NVML} answers with error {code}")
    try:
        text, number = ctypes.create_string_buffer(80), ctypes.c_int()
        code = library.nvmlSystemGetDriverVersion(text, len(text))
        code = code or library.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(number))
        if code:
            raise OSError(f"{NVML} answers with error {code}")
    finally:
        library.nvmlShutdown()
    return text.value.decode(), f"{number.value // 1000}.{number.value % 1000 // 10}"
