# SPDX-License-Identifier: Apache-2.0
"""Means of a few consecutive keys."""

import torch

from minference_vllm import reference
from minference_vllm.chunk import PagedKV
from minference_vllm.kernels import triton
from minference_vllm.ops.kernel import Kernel
from minference_vllm.scratch import MEAN


def key_means(kv: PagedKV, seq_len: int, means: torch.Tensor, kernel: Kernel, first: int = 0) -> None:
    """See minference_vllm.reference.key_means.

    Raises:
        ValueError: `means` has no room for the means of all keys, or not laid out as kernels read it.
    """
    if seq_len // MEAN > means.shape[1]:
        raise ValueError(f"means has room for {means.shape[1]} of {MEAN} keys, and seq_len={seq_len}")
    if means.stride()[1:] != (means.shape[2], 1):
        raise ValueError(f"means must be contiguous in its last two dimensions, got strides {means.stride()}")
    run = reference.key_means if kernel is Kernel.REFERENCE else triton.key_means
    run(kv, seq_len, means, first)
