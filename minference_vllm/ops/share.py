# SPDX-License-Identifier: Apache-2.0
"""How many of the heaviest entries hold a share of a row's mass."""

import torch

from minference_vllm import reference
from minference_vllm.kernels import triton
from minference_vllm.ops.kernel import Kernel
from minference_vllm.scratch import SelectBuffers


def share_sizes(
    mass: torch.Tensor,
    length: int,
    share: torch.Tensor,
    forced: torch.Tensor,
    max_keep: int,
    keep: torch.Tensor,
    buffers: SelectBuffers,
    kernel: Kernel,
) -> None:
    """See minference_vllm.reference.share_sizes.

    Raises:
        ValueError: `length` is below 1 or above the number of entries in a row.
    """
    if not 0 < length <= mass.shape[1]:
        raise ValueError(f"length={length}: rows have 1 .. {mass.shape[1]} entries")
    run = reference.share_sizes if kernel is Kernel.REFERENCE else triton.share_sizes
    run(mass, length, share, forced, max_keep, keep, buffers)
