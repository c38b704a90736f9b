# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of csrc/, one shared library beside the package; setup.py builds it where nvcc is at hand."""

import ctypes
import functools
from collections.abc import Iterable
from pathlib import Path

import torch

PATH = Path(__file__).parents[2] / "_hopper.so"
# The bulk copy engine wants addresses and strides that are multiples of this.
ALIGNMENT_BYTES = 16


def load() -> ctypes.CDLL | None:
    """The library, None where there is none to be loaded."""
    found = _open()
    return None if isinstance(found, str) else found


def why_missing() -> str:
    """Why `load` gives None; empty if it does not."""
    found = _open()
    return found if isinstance(found, str) else ""


@functools.cache
def _open() -> ctypes.CDLL | str:
    if not PATH.exists():
        return "no CUDA library in this installation (built without nvcc; MINFERENCE_BUILD_CUDA=1 insists on it)"
    try:
        return ctypes.CDLL(str(PATH))
    except OSError as error:
        return f"the CUDA library cannot be loaded ({error})"


def launch(function: str, arguments: ctypes.Structure, device: torch.device) -> None:
    """Launch a kernel on the device's current stream.

    Args:
        function: its name in the library; it takes a pointer to `arguments` and a stream, and returns a CUDA error.

    Raises:
        RuntimeError: CUDA refused.
    """
    library = _open()
    if isinstance(library, str):
        raise RuntimeError(library)
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    if error := library[function](ctypes.byref(arguments), stream):
        describe = library.minference_error
        describe.restype = ctypes.c_char_p
        raise RuntimeError(f"{function}: {describe(error).decode()}")


def are_aligned(tensors: Iterable[torch.Tensor], strides: Iterable[int]) -> bool:
    """Whether the bulk copy engine can read 16-bit elements from these addresses in these strides (elements)."""
    return all(tensor.data_ptr() % ALIGNMENT_BYTES == 0 for tensor in tensors) and all(
        2 * stride % ALIGNMENT_BYTES == 0 for stride in strides
    )


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
