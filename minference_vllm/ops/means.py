# SPDX-License-Identifier: Apache-2.0
"""Means of consecutive keys."""

from typing import Literal

import torch

from minference_vllm import reference
from minference_vllm.boxes import BOX_MEAN, COARSE_AT_ONCE
from minference_vllm.chunk import PagedKV
from minference_vllm.errors import ConfigError
from minference_vllm.kernels import cuda, triton
from minference_vllm.ops.kernel import Kernel, describe
from minference_vllm.scratch import FP8, MEAN, ScratchShape

FP8_CAPABILITY = (8, 9)
"""The lowest compute capability for which Triton supports FP8."""


def means_dtype(
    asked: Literal["auto", "fp8", "model"], shape: ScratchShape, kernel: Kernel, device: torch.device
) -> torch.dtype:
    """The dtype in which means are stored and query rows are scored against them.

    Args:
        asked: "auto" is FP8 where it makes scores faster, else the model's dtype.
        shape: of the layer's scratch, which says the model's dtype.
        kernel, device: the kernels that compute the scores, and their device.

    Raises:
        ConfigError: FP8 was asked for, and the kernels do not support it on this device.
    """
    is_faster = kernel is Kernel.CUDA and cuda.masses.is_faster_in_fp8(shape.head_dim, shape.dtype)
    if asked == "model" or (asked == "auto" and not is_faster):
        return shape.dtype
    if kernel is Kernel.TRITON and device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        fault = f"minference.method.score_dtype={asked!r} cannot run here: there is no FP8 on {describe(device)}"
        raise ConfigError(f"{fault}. Use 'auto' or 'model'.")
    return FP8


def key_means(kv: PagedKV, seq_len: int, means: torch.Tensor, kernel: Kernel) -> None:
    """See minference_vllm.reference.key_means.

    Raises:
        ValueError: `means` has no room for the means of all keys, or is not laid out as kernels read it.
    """
    if seq_len // MEAN > means.shape[1]:
        raise ValueError(f"means has room for {means.shape[1]} of {MEAN} keys, and seq_len={seq_len}")
    if means.stride()[1:] != (means.shape[2], 1):
        raise ValueError(f"means must be contiguous in its last two dimensions, got strides {means.stride()}")
    run = reference.key_means if kernel is Kernel.REFERENCE else triton.key_means
    run(kv, seq_len, means)


def coarse_means(means: torch.Tensor, seq_len: int, coarse: torch.Tensor, kernel: Kernel) -> None:
    """Coarse means from those of MEAN keys: see minference_vllm.reference.coarse_means.

    Raises:
        ValueError: `coarse` has no room for the means of all keys.
    """
    room = coarse.shape[1]
    if seq_len // BOX_MEAN > room or room % COARSE_AT_ONCE or coarse.dtype != means.dtype:
        raise ValueError(
            f"coarse must have room for the means of {seq_len // BOX_MEAN} times {BOX_MEAN} keys and a multiple of "
            f"{COARSE_AT_ONCE}, in {means.dtype}; got {room} in {coarse.dtype}"
        )
    run = reference.coarse_means if kernel is Kernel.REFERENCE else triton.coarse_means
    run(means, seq_len, coarse, MEAN, BOX_MEAN)
