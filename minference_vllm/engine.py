# SPDX-License-Identifier: Apache-2.0
"""Which code runs the sparse path: kernels on a GPU, their plain-torch twins without one."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minference_vllm.config import ConfigError, MInferenceConfig

HOPPER = 9


@dataclass(frozen=True, slots=True)
class Engine:
    """The four operations of the sparse path; signatures as in minference_vllm.reference."""

    name: str
    probe: Callable[..., None]
    select: Callable[..., None]
    band_lists: Callable[..., None]
    attend: Callable[..., None]


def load_engine(config: MInferenceConfig, device: torch.device) -> Engine:
    """The engine that `kernel` asks for on this device.

    Raises:
        ConfigError: a kernel was asked for that the device cannot run.
    """
    on_gpu = device.type == "cuda"
    on_hopper = on_gpu and torch.cuda.get_device_capability(device)[0] == HOPPER
    best = "hopper" if on_hopper else "triton" if on_gpu else "reference"
    name = best if config.kernel == "auto" else config.kernel
    if (name == "hopper" and not on_hopper) or (name == "triton" and not on_gpu):
        here = torch.cuda.get_device_name(device) if on_gpu else device.type
        needs = "an H100 or H200" if name == "hopper" else "a GPU"
        raise ConfigError(f"minference.kernel={name!r} needs {needs} and this is {here!r}: use 'auto' or {best!r}.")
    if name == "reference":
        from minference_vllm import reference

        return Engine(name, reference.probe, reference.select, reference.band_lists, reference.attend)
    from minference_vllm import kernels

    attend = kernels.attend_on_hopper if name == "hopper" else kernels.attend
    return Engine(name, kernels.probe, kernels.select, kernels.band_lists, attend)
