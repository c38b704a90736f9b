# SPDX-License-Identifier: Apache-2.0
"""Lists of the kept bands, as the attention kernels read them."""

import torch

from minference_vllm import reference
from minference_vllm.kernels import triton
from minference_vllm.ops.kernel import Kernel


def band_lists(
    slash_indptr: torch.Tensor,
    num_bands: int,
    bands: torch.Tensor,
    bands_indptr: torch.Tensor,
    band_halves: torch.Tensor,
    kernel: Kernel,
) -> None:
    """See minference_vllm.reference.band_lists."""
    run = reference.band_lists if kernel is Kernel.REFERENCE else triton.band_lists
    run(slash_indptr, num_bands, bands, bands_indptr, band_halves)
