# SPDX-License-Identifier: Apache-2.0
"""The kernels of csrc/ for Hopper (sm_90a), called through ctypes: one build works with every torch version."""

from minference_vllm.kernels.cuda import attend, library, masses, probe, select

__all__ = ["attend", "library", "masses", "probe", "select"]
