# SPDX-License-Identifier: Apache-2.0
"""Whether there is a GPU that the kernels support, and the CUDA library for it."""

from collections.abc import Iterator

import torch

from minference_vllm.doctor.check import NO_GPU, Check, failed, ok, on_one_line, skipped
from minference_vllm.kernels.cuda import library
from minference_vllm.ops.kernel import HOPPER, describe

OLDEST = (8, 0)
"""Lowest compute capability on which vLLM's FlashAttention runs, and therefore all of our kernels."""


def device() -> torch.device:
    """Where a server would run: the current GPU, or the CPU if there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def check_gpu(expects_gpu: bool = True) -> Iterator[Check]:
    """The GPU and the CUDA library, which is for Hopper; where no GPU is expected, only whether the library loads."""
    if not expects_gpu:
        yield skipped("gpu", NO_GPU)
        yield _check_loading()
        return
    if torch.cuda.is_available():
        yield _check_capability(device())
        yield _check_library(device())
        return
    yield _check_absence()
    yield skipped("cuda library", "no GPU")


def _check_absence() -> Check:
    if torch.version.cuda is None:
        return skipped("gpu", "none, and PyTorch is built without CUDA: the reference engine serves, for trials only")
    try:
        torch.cuda.init()
        found = "PyTorch sees none"
    except (RuntimeError, AssertionError) as error:
        found = on_one_line(error)
    remedy = "Let the process have a GPU (docker run --gpus all, CUDA_VISIBLE_DEVICES), with a driver for this CUDA"
    return failed("gpu", found, remedy)


def _check_capability(gpu: torch.device) -> Check:
    capability, count = torch.cuda.get_device_capability(gpu), torch.cuda.device_count()
    found = f"{describe(gpu)}{f', and {count - 1} more' if count > 1 else ''}"
    if capability < OLDEST:
        return failed("gpu", found, "Use a GPU of compute capability {}.{} or more".format(*OLDEST))
    return ok("gpu", found, count=count)


def _check_library(gpu: torch.device) -> Check:
    if torch.cuda.get_device_capability(gpu)[0] != HOPPER:
        return skipped("cuda library", "it is for H100 and H200; here Triton's kernels serve")
    return _check_loading()


def _check_loading() -> Check:
    if why := library.why_missing():
        remedy = "Install where there is an nvcc of 12.5 or newer: MINFERENCE_BUILD_CUDA=1 pip install . "
        return failed("cuda library", why, remedy + "(without the library Triton serves, more slowly)")
    return ok("cuda library", str(library.PATH))
