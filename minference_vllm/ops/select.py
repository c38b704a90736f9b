# SPDX-License-Identifier: Apache-2.0
"""The heaviest entries of each row of masses."""

import torch

from minference_vllm import reference
from minference_vllm.kernels import triton
from minference_vllm.ops.kernel import Kernel
from minference_vllm.scratch import SelectBuffers


def select(
    mass: torch.Tensor,
    length: int,
    keep: torch.Tensor,
    forced: torch.Tensor,
    indptr: torch.Tensor,
    grain: int,
    out: torch.Tensor | None,
    buffers: SelectBuffers,
    kernel: Kernel,
) -> None:
    """See minference_vllm.reference.select.

    Raises:
        ValueError: `indptr` has no room for the marks of all entries.
    """
    if not 0 < length <= indptr.shape[1] * grain:
        raise ValueError(f"length={length}: {indptr.shape[1]} marks of {grain} reach 1 .. {indptr.shape[1] * grain}")
    run = reference.select if kernel is Kernel.REFERENCE else triton.select
    run(mass, length, keep, forced, indptr, grain, out, buffers)
