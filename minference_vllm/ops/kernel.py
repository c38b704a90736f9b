# SPDX-License-Identifier: Apache-2.0
"""Which code runs the sparse path: CUDA on Hopper, Triton on any GPU, plain torch without one."""

import logging
from enum import StrEnum

import torch

from minference_vllm.errors import ConfigError
from minference_vllm.kernels.cuda import library
from minference_vllm.scratch import ScratchShape

HOPPER = 9
AUTO = "auto"

logger = logging.getLogger("vllm.minference")


class Kernel(StrEnum):
    """The implementations of the sparse path, the fastest first."""

    CUDA = "cuda"
    TRITON = "triton"
    REFERENCE = "reference"


def choose_kernel(asked: str, device: torch.device) -> Kernel:
    """The kernels that the setting `kernel` asks for on this device; says in the log which ones and why.

    Args:
        asked: "auto", or the value of a Kernel.
        device: where the model runs.

    Raises:
        ConfigError: a kernel was asked for that cannot run here.
    """
    kernel, reason = _choose(asked, device)
    logger.info("MInference: kernel %s: %s", kernel, reason)
    return kernel


def report_shape(kernel: Kernel, asked: str, shape: ScratchShape) -> None:
    """Log it if layers of this shape run in Triton although the CUDA library is chosen."""
    if kernel is not Kernel.CUDA or not (obstacle := library.why_not(shape) or library.why_not_probe(shape)):
        return
    say = logger.info if asked == AUTO else logger.warning
    what = "" if library.why_not(shape) else "the probe of "
    say("MInference: kernel %s instead of %s for %s%s: %s", Kernel.TRITON, kernel, what, shape, obstacle)


def _choose(asked: str, device: torch.device) -> tuple[Kernel, str]:
    """The kernels, and why it is these."""
    obstacles = {Kernel.CUDA: _cuda_obstacle(device), Kernel.TRITON: _gpu_obstacle(device), Kernel.REFERENCE: ""}
    able = [kernel for kernel, obstacle in obstacles.items() if not obstacle]
    if asked != AUTO:
        if obstacle := obstacles[Kernel(asked)]:
            fault = f"minference.kernel={asked!r} cannot run here: {obstacle}"
            raise ConfigError(f"{fault}. Use 'auto' or {able[0].value!r}.")
        return Kernel(asked), "asked for"
    better = [obstacle for obstacle in obstacles.values() if obstacle]
    return able[0], better[-1] if better else f"this is {describe(device)}"


def _gpu_obstacle(device: torch.device) -> str:
    return "" if device.type == "cuda" else f"no GPU (the device is {device.type})"


def _cuda_obstacle(device: torch.device) -> str:
    if obstacle := _gpu_obstacle(device):
        return obstacle
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        return f"the CUDA library is for H100 and H200, and this is {describe(device)}"
    return library.why_missing()


def describe(device: torch.device) -> str:
    """A GPU's name and compute capability."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
