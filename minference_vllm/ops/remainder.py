# SPDX-License-Identifier: Apache-2.0
"""The remainder of attention, on the keys that a tile drops, through summaries of boxes of keys."""

from minference_vllm import reference
from minference_vllm.chunk import Chunk, PagedKV
from minference_vllm.index import GROUP, TileIndex
from minference_vllm.kernels import triton
from minference_vllm.ops.kernel import Kernel
from minference_vllm.remainder import Summaries
from minference_vllm.scratch import AttendBuffers


def summarise(kv: PagedKV, num_boxes: int, keys_per_box: int, summaries: Summaries, kernel: Kernel) -> None:
    """See minference_vllm.reference.summarise.

    Raises:
        ValueError: there is no room for so many boxes, or they do not hold whole groups.
    """
    room = summaries.keys.shape[1]
    if num_boxes > room or keys_per_box % GROUP:
        raise ValueError(
            f"summaries have room for {room} boxes of a multiple of {GROUP} keys, got {num_boxes} of {keys_per_box}"
        )
    run = reference.summarise if kernel is Kernel.REFERENCE else triton.summarise
    run(kv, num_boxes, keys_per_box, summaries)


def add_remainder(
    chunk: Chunk, index: TileIndex, keys_per_box: int, summaries: Summaries, buffers: AttendBuffers, kernel: Kernel
) -> None:
    """See minference_vllm.reference.add_remainder."""
    run = reference.add_remainder if kernel is Kernel.REFERENCE else triton.add_remainder
    run(chunk, index, keys_per_box, summaries, buffers)
