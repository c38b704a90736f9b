# SPDX-License-Identifier: Apache-2.0
"""How the kept keys are chosen: each method is a module, and METHODS lists them."""

from minference_vllm.methods.base import MAX_TOKENS, Method, MethodSettings
from minference_vllm.methods.block import Block
from minference_vllm.methods.vertical_slash import VerticalSlash
from minference_vllm.ops import Kernel

METHODS: tuple[type[Method], ...] = (Block, VerticalSlash)
"""Everything that the setting `method` may name, except "auto"."""


def make_method(settings: MethodSettings, kernel: Kernel) -> Method:
    """The method that these settings belong to."""
    [method] = [method for method in METHODS if isinstance(settings, method.Settings)]
    return method(settings, kernel)


__all__ = ["MAX_TOKENS", "METHODS", "Block", "Method", "MethodSettings", "VerticalSlash", "make_method"]
