# SPDX-License-Identifier: Apache-2.0
"""Device code: Triton for every GPU, CUDA C++ (cuda/) for Hopper. Imports torch and triton, never vLLM."""

from minference_vllm.kernels.attend import attend
from minference_vllm.kernels.bands import band_lists
from minference_vllm.kernels.probe import probe
from minference_vllm.kernels.select import select

__all__ = ["attend", "band_lists", "probe", "select"]
