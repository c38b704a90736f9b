# SPDX-License-Identifier: Apache-2.0
"""The kernels of csrc/ for Hopper (sm_90a), called through ctypes: one build serves every torch."""

from minference_vllm.kernels.cuda.attend import attend
from minference_vllm.kernels.cuda.probe import probe

__all__ = ["attend", "probe"]
