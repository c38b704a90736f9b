# SPDX-License-Identifier: Apache-2.0
"""A chunk is refused before a kernel reads or writes it wrongly; and what it says of itself."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from minference_vllm.chunk import Chunk, PagedKV


def make(**changes: Any) -> Chunk:
    q = torch.zeros(5, 4, 64)
    cache = torch.zeros(3, 2, 16, 128)
    k, v = cache.split(64, dim=-1)
    plain = {
        "q": q,
        "out": torch.zeros_like(q),
        "k": k,
        "v": v,
        "table": torch.zeros(2, 3, dtype=torch.int32),
        "row": 1,
    }
    of = {**plain, **changes}
    return Chunk(of["q"], of["out"], PagedKV(of["k"], of["v"], of["table"], of["row"]), 30, 0.125)


def test_a_plain_chunk_is_taken() -> None:
    chunk = make()
    assert (chunk.num_rows, chunk.num_qo_heads, chunk.head_dim, chunk.group_size, chunk.seq_len) == (5, 4, 64, 2, 35)
    assert chunk.kv.page_size == 16


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"q": torch.zeros(5, 64, 4).transpose(1, 2)}, "q and out must end in stride 1"),
        ({"out": torch.zeros(5, 64, 4).transpose(1, 2)}, "q and out must end in stride 1"),
        ({"out": torch.zeros(6, 4, 64)}, "both must be alike"),
        ({"out": torch.zeros(5, 4, 64, dtype=torch.bfloat16)}, "both must be alike"),
        ({"k": torch.zeros(3, 2, 16, 128, dtype=torch.uint8)[..., :64]}, r"k is torch\.uint8 without a scale"),
        ({"table": torch.zeros(2, 3, dtype=torch.int64)}, "block_table must be int32"),
        ({"table": torch.zeros(3, 2, dtype=torch.int32).T}, "block_table must be int32 with stride 1"),
        ({"row": 2}, "hold row 2"),
        ({"k": torch.zeros(3, 2, 16, 64)}, "k and v must share strides"),
        ({"k": torch.zeros(3, 2, 24, 64), "v": torch.zeros(3, 2, 24, 64)}, "pages of 24 keys"),
        ({"q": torch.zeros(5, 3, 64), "out": torch.zeros(5, 3, 64)}, "3 query heads"),
    ],
)
def test_what_a_kernel_would_read_wrongly_is_refused(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        make(**changes)


@pytest.mark.parametrize(
    ("context_len", "first_tile", "num_tiles"), [(0, 0, 1), (123, 0, 1), (124, 0, 2), (128, 1, 1), (300, 2, 1)]
)
def test_tiles_lie_on_absolute_positions(context_len: int, first_tile: int, num_tiles: int) -> None:
    chunk = make()
    moved = Chunk(chunk.q, chunk.out, chunk.kv, context_len, 1.0)
    assert (moved.first_tile, moved.num_tiles) == (first_tile, num_tiles)


@pytest.mark.parametrize("context_len", [0, 1, 9])
def test_causal_pairs_are_what_dense_attention_computes(context_len: int) -> None:
    chunk = make()
    moved = Chunk(chunk.q, chunk.out, chunk.kv, context_len, 1.0)
    assert moved.causal_pairs == sum(context_len + row + 1 for row in range(5))


@pytest.mark.parametrize(("first", "count"), [(0, 4), (2, 2), (1, 1)])
def test_some_heads_of_a_chunk_have_their_own_sinks(first: int, count: int) -> None:
    chunk = replace(make(), sinks=torch.arange(4.0))
    sinks = chunk.of_heads(first, count).sinks
    assert sinks is not None
    assert sinks.tolist() == [*range(first, first + count)]
    assert make().of_heads(first, count).sinks is None
