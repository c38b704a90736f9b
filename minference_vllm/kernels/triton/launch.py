# SPDX-License-Identifier: Apache-2.0
"""How Triton kernels are launched, and arguments that all kernels which read the cache have in common."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from minference_vllm.chunk import Chunk, PagedKV
from minference_vllm.kernels.tape import Own, Place, Tape, current_tape

LOG2_E = 1.4426950408889634


class TritonLaunch(NamedTuple):
    """A launch on a tape.

    Attributes:
        launch: the kernel on its grid.
        arguments: with a Place for each tensor that lies in one of a layer's own.
        constants: by name.
    """

    launch: Callable[..., object]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @classmethod
    def of(
        cls, kernel: Any, grid: tuple[int, ...], compiled: Any, arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> "TritonLaunch":
        """What a kernel was launched with.

        Args:
            compiled: what Triton returned, the variant that it selected by the arguments. Launching this takes the host
                an eighth of the time that selecting it takes. The interpreter returns none.
        """
        if compiled is None:
            return cls(kernel[grid], arguments, constants)
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        return cls(compiled[(*grid, 1, 1)[:3]], tuple(named[name] for name in kernel.arg_names), {})

    def repeat(self, own: Own) -> None:
        arguments = [_at(value, own) if type(value) is Place else value for value in self.arguments]
        self.launch(*arguments, **self.constants)


def on_grid(kernel: Any, grid: tuple[int, ...]) -> Callable[..., object]:
    """A kernel on a grid, to be called with its arguments: `kernel[grid]`, recorded if a tape is running."""
    launch: Callable[..., object] = kernel[grid]
    tape = current_tape()
    if tape is None:
        return launch

    def launch_and_record(*arguments: Any, **constants: Any) -> None:
        compiled = launch(*arguments, **constants)
        placed = tuple(_placed(value, tape) for value in arguments)
        tape.add(TritonLaunch.of(kernel, grid, compiled, placed, constants))

    return launch_and_record


def _placed(value: Any, tape: Tape) -> Any:
    """A tensor's place among a layer's own; everything else as it is."""
    place = tape.find(value.data_ptr()) if isinstance(value, torch.Tensor) else None
    return value if place is None else place


def _at(place: Place, own: Own) -> torch.Tensor:
    """A tensor that begins at a place. Kernels are told strides and sizes, so its own mean nothing."""
    tensor = own[place.number]
    assert tensor is not None
    if place.offset == 0:
        return tensor
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + place.offset // tensor.element_size())


def kv_strides(kv: PagedKV) -> tuple[int, int, int]:
    """Strides of page, KV head and token, the same for k and v.

    The stride of a dimension of size 1 is arbitrary (one KV head under tensor parallelism). It is replaced by 0, so
    that a meaningless number, above all 1, does not make Triton compile another variant.
    """
    page, head, token, _ = kv.k.stride()
    return page, head if kv.num_kv_heads > 1 else 0, token


# The scales of FP8 are tensors. Neither their alignment nor their stride (0 if one scale serves all heads) must select
# another compiled variant.
SCALES = ["q_scale_ptr", "k_scale_ptr", "v_scale_ptr"]
SCALE_STRIDES = ["stride_q_scale", "stride_k_scale", "stride_v_scale"]


def score_scales(chunk: Chunk) -> tuple[Any, ...]:
    """Scales of queries and keys, each with its stride from KV head to KV head; None for what has no scale."""
    return *_described(chunk.q_scale), *_described(chunk.kv.k_scale)


def all_scales(chunk: Chunk) -> tuple[Any, ...]:
    """Scales of queries, keys and values, see score_scales."""
    return *score_scales(chunk), *_described(chunk.kv.v_scale)


def _described(scale: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    return (None, 0) if scale is None else (scale, scale.stride(0))


@triton.jit
def scaled(x, scale_ptr, stride, i_kv):
    """`x`, a number or a block, times the scale of a KV head; without scales as it is."""
    if scale_ptr is not None:
        x = x * tl.load(scale_ptr + i_kv * stride)
    return x


@triton.jit
def scaled_scores(scale_log2, q_scale_ptr, stride_q_scale, k_scale_ptr, stride_k_scale, i_kv):
    """The scale of products of stored queries and keys."""
    return scaled(scaled(scale_log2, q_scale_ptr, stride_q_scale, i_kv), k_scale_ptr, stride_k_scale, i_kv)
