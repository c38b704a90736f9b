# SPDX-License-Identifier: Apache-2.0
"""The engines as the package puts them together, on whatever device: tests say which can run where."""

from minference_vllm.engine import _ENGINES

CUDA, TRITON, REFERENCE = (_ENGINES[name]() for name in ("cuda", "triton", "reference"))
