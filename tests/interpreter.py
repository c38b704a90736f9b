# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, without work that it does again and again."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

from triton import language
from triton.runtime import interpreter


class Patched:
    """Stands for the interpreter's function that makes the language's functions run in Python.

    The interpreter calls it for a launch and for every call of a function inside a kernel, where most finds everything
    patched already: looking through the language's members for it took a third of the time of the kernels' tests.
    """

    def __init__(self, patch: Callable[[FunctionType], Any]) -> None:
        self.patch = patch
        self.patched: set[int] = set()

    def __call__(self, function: FunctionType) -> Any:
        seen = {id(value) for value in function.__globals__.values() if value is language or value is language.core}
        if seen and seen <= self.patched:
            return None  # only a launch looks at what comes back, and nothing is patched before one
        scope = self.patch(function)
        self.patched |= seen
        restore = scope.restore

        def restore_all() -> None:
            self.patched.clear()
            restore()

        scope.restore = restore_all
        return scope


def patch_once_a_launch() -> None:
    interpreter._patch_lang = Patched(interpreter._patch_lang)
