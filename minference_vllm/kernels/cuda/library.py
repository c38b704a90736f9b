# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of csrc/, one shared library beside the package; setup.py builds it where nvcc is at hand."""

import ctypes
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from minference_vllm.chunk import Chunk
from minference_vllm.kernels.tape import Own, Place, Tape, current_tape
from minference_vllm.scratch import ScratchShape

PATH = Path(__file__).parents[2] / "_hopper.so"
SUPPORTED_HEAD_DIMS = (64, 128)
SUPPORTED_DTYPES = (torch.bfloat16, torch.float16)
FP8_PROBE_HEAD_DIM = 128  # rows of smaller heads are shorter than what the probe copies at once
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


def why_not(shape: ScratchShape) -> str:
    """Why the kernels cannot choose groups and attend for layers of this shape; empty if they can."""
    if shape.has_fp8_kv and not shape.has_fp8_q:
        return f"the CUDA kernels read a cache in FP8 under queries in FP8, and these are in {shape.dtype}"
    if shape.head_dim not in SUPPORTED_HEAD_DIMS:
        return f"the CUDA kernels are made for heads of 64 and 128, and these have {shape.head_dim}"
    return ""


def why_not_probe(shape: ScratchShape) -> str:
    """Why the kernels cannot probe for layers of this shape; empty if they can."""
    if shape.has_fp8_kv and shape.head_dim != FP8_PROBE_HEAD_DIM:
        return f"over a cache in FP8 the CUDA probe is made for heads of 128, and these have {shape.head_dim}"
    return why_not(shape)


class CudaLaunch(NamedTuple):
    """A launch on a tape.

    Attributes:
        function, arguments, device: see `launch`.
        moved: the fields that hold addresses in a layer's own tensors: the structure, its field, and the place.
    """

    function: str
    arguments: ctypes.Structure
    device: torch.device
    moved: list[tuple[ctypes.Structure, str, Place]]

    def repeat(self, own: Own) -> None:
        for structure, field, place in self.moved:
            setattr(structure, field, place.address(own))
        enqueue(self.function, self.arguments, self.device)


def launch(function: str, arguments: ctypes.Structure, device: torch.device) -> None:
    """Launch a kernel on the device's current stream, and record it if a tape is running.

    Args:
        function: its name in the library; it takes a pointer to `arguments` and a stream, and returns a CUDA error.
            A tape keeps `arguments`, and changes them.

    Raises:
        RuntimeError: CUDA refused, or another device is current.
    """
    enqueue(function, arguments, device)
    if (tape := current_tape()) is not None:
        tape.add(CudaLaunch(function, arguments, device, list(_moved(arguments, tape))))


def _moved(arguments: ctypes.Structure, tape: Tape) -> Iterator[tuple[ctypes.Structure, str, Place]]:
    for field, kind, *_ in arguments._fields_:
        value = getattr(arguments, field)
        if issubclass(kind, ctypes.Structure):
            yield from _moved(value, tape)
        elif kind is ctypes.c_void_p and value is not None and (place := tape.find(value)) is not None:
            yield arguments, field, place


def enqueue(function: str, arguments: ctypes.Structure, device: torch.device) -> None:
    """As `launch`, but never recorded."""
    library = load()
    if library is None:
        raise RuntimeError(why_missing())
    if (current := torch.cuda.current_device()) != device.index:  # CUDA launches on the current device
        raise RuntimeError(f"{function}: its tensors are on {device}, the current device is cuda:{current}. Set it.")
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    if error := getattr(library, function)(ctypes.byref(arguments), stream):  # looked up once, unlike library[function]
        describe = library.minference_error
        describe.restype = ctypes.c_char_p
        raise RuntimeError(f"{function}: {describe(error).decode()}")


def pointers_of(*names: str) -> list[tuple[str, Any]]:
    """Fields of a structure that point to tensors."""
    return [(name, ctypes.c_void_p) for name in names]


def strides_of(*names: str) -> list[tuple[str, Any]]:
    """Fields of a structure that hold strides, in elements."""
    return [(f"stride_{name}", ctypes.c_int64) for name in names]


def sizes_of(*names: str) -> list[tuple[str, Any]]:
    """Fields of a structure that hold sizes, or flags."""
    return [(name, ctypes.c_int32) for name in names]


def arguments_of(pointers: Sequence[str], strides: Sequence[str], sizes: Sequence[str]) -> list[tuple[str, Any]]:
    """Fields of the structure that a function of the library takes: the C structure has the same ones, in order."""
    return [
        *pointers_of(*pointers),
        *strides_of(*strides),
        *sizes_of(*sizes),
        ("scale_log2", ctypes.c_float),
    ]


def is_made_for(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernels are compiled for this head_dim and this dtype of the model."""
    return head_dim in SUPPORTED_HEAD_DIMS and dtype in SUPPORTED_DTYPES


def is_aligned(tensors: Sequence[torch.Tensor], strides: Iterable[int]) -> bool:
    """Whether kernels can read or write these tensors, all of one dtype, in pieces of ALIGNMENT_BYTES.

    Args:
        strides: the tensors' strides, in elements.
    """
    size = tensors[0].element_size()
    return all(tensor.data_ptr() % ALIGNMENT_BYTES == 0 for tensor in tensors) and all(
        stride * size % ALIGNMENT_BYTES == 0 for stride in strides
    )


def score_scales(chunk: Chunk) -> dict[str, int]:
    """The arguments that name the scales of queries and keys; none where the queries have no scale."""
    if chunk.q_scale is None or chunk.kv.k_scale is None:
        return {}
    return {
        "q_scale": chunk.q_scale.data_ptr(),
        "k_scale": chunk.kv.k_scale.data_ptr(),
        "stride_q_scale": chunk.q_scale.stride(0),
        "stride_k_scale": chunk.kv.k_scale.stride(0),
    }


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
