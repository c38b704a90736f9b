# SPDX-License-Identifier: Apache-2.0
"""The attending kernel for Hopper. Imported where it runs only: Gluon's interface moves faster than Triton's."""

from minference_vllm.kernels.hopper.attend import attend, supports

__all__ = ["attend", "supports"]
