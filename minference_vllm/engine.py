# SPDX-License-Identifier: Apache-2.0
"""Which code runs the sparse path: kernels on a GPU, their plain-torch twins without one."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minference_vllm.config import ConfigError, MInferenceConfig

HOPPER = 9

logger = logging.getLogger("vllm.minference")


@dataclass(frozen=True, slots=True)
class Engine:
    """The four operations of the sparse path; signatures as in minference_vllm.reference."""

    name: str
    probe: Callable[..., None]
    select: Callable[..., None]
    band_lists: Callable[..., None]
    attend: Callable[..., None]


def load_engine(config: MInferenceConfig, device: torch.device) -> Engine:
    """The engine that `kernel` asks for on this device; says in the log which one and why.

    Raises:
        ConfigError: a kernel was asked for that cannot run here.
    """
    name, reason = _choose(config.kernel, device)
    logger.info("MInference: kernel %s: %s", name, reason)
    return _ENGINES[name]()


@functools.cache  # every layer asks, and the log need say it once
def report_head_dim(engine: Engine, head_dim: int) -> None:
    """Say in the log if heads of this size run other kernels than those that the engine is named for."""
    if engine.name != "cuda":
        return
    from minference_vllm.kernels.cuda import library

    if head_dim not in library.SUPPORTED_HEAD_DIMS:
        sizes = " and ".join(map(str, library.SUPPORTED_HEAD_DIMS))
        logger.info("MInference: heads of %d run the Triton kernels (the CUDA library is for %s)", head_dim, sizes)


def _choose(asked: str, device: torch.device) -> tuple[str, str]:
    """Name of the engine, and why it is this one."""
    # Best first; why each cannot run here.
    obstacles = {"cuda": _cuda_obstacle(device), "triton": _gpu_obstacle(device), "reference": ""}
    able = [name for name, obstacle in obstacles.items() if not obstacle]
    if asked != "auto":
        if obstacles[asked]:
            fault = f"minference.kernel={asked!r} cannot run here: {obstacles[asked]}"
            raise ConfigError(f"{fault}. Use 'auto' or {able[0]!r}.")
        return asked, "asked for"
    better = [obstacle for obstacle in obstacles.values() if obstacle]
    return able[0], better[-1] if better else f"this is {_describe(device)}"


def _gpu_obstacle(device: torch.device) -> str:
    return "" if device.type == "cuda" else f"no GPU (the device is {device.type})"


def _cuda_obstacle(device: torch.device) -> str:
    if obstacle := _gpu_obstacle(device):
        return obstacle
    if torch.cuda.get_device_capability(device)[0] != HOPPER:
        return f"the CUDA library is for H100 and H200, and this is {_describe(device)}"
    from minference_vllm.kernels.cuda import library

    return library.why_missing()


def _describe(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"


def _cuda() -> Engine:
    from minference_vllm import kernels
    from minference_vllm.kernels import cuda

    return Engine("cuda", cuda.probe, kernels.select, kernels.band_lists, cuda.attend)


def _triton() -> Engine:
    from minference_vllm import kernels

    return Engine("triton", kernels.probe, kernels.select, kernels.band_lists, kernels.attend)


def _reference() -> Engine:
    from minference_vllm import reference

    return Engine("reference", reference.probe, reference.select, reference.band_lists, reference.attend)


_ENGINES: dict[str, Callable[[], Engine]] = {"cuda": _cuda, "triton": _triton, "reference": _reference}
