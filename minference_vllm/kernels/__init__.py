# SPDX-License-Identifier: Apache-2.0
"""Device code: Triton for every GPU, Gluon for Hopper's attending kernel. Imports torch and triton, never vLLM."""

from typing import Any

import torch

from minference_vllm.kernels.attend import attend
from minference_vllm.kernels.bands import band_lists
from minference_vllm.kernels.probe import probe
from minference_vllm.kernels.select import select

__all__ = ["attend", "attend_on_hopper", "band_lists", "probe", "select"]


def attend_on_hopper(q: torch.Tensor, *args: Any) -> None:
    """See minference_vllm.reference.attend; what Hopper's kernel is not made for (head_dim 256) runs in Triton's."""
    from minference_vllm.kernels import hopper

    (hopper.attend if hopper.supports(q) else attend)(q, *args)
