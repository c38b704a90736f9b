# SPDX-License-Identifier: Apache-2.0
"""The last rows of a prompt, which attend to all keys."""

from dataclasses import replace

import pytest
import torch

from minference_vllm.chunk import Chunk
from minference_vllm.index import EVERY_GROUP, TILE, TileIndex
from minference_vllm.ops import Kernel
from tests.kernels.blocks import SPARSE, engines, kept_by_half
from tests.kernels.cases import make_chunk
from tests.kernels.test_block import choose

SETTINGS = dict(share=0.5, long_from=0, sink_tokens=16, local_tokens=16, max_density=1.0)
NOTHING_LEFT_OUT = [EVERY_GROUP, 0, 0]


def make(num_rows: int, context_len: int, device: torch.device, may_end_prompt: bool = True) -> Chunk:
    chunk = make_chunk(replace(SPARSE, num_rows=num_rows, context_len=context_len), device)
    return replace(chunk, may_end_prompt=may_end_prompt)


def check_same(index: TileIndex, other: TileIndex, chunk: Chunk, tiles: range) -> None:
    for head in range(chunk.num_qo_heads):
        for tile in tiles:
            assert torch.equal(kept_by_half(index, chunk, head, tile), kept_by_half(other, chunk, head, tile))


@engines
@pytest.mark.parametrize(
    ("num_rows", "context_len", "last_tokens", "choosing"),
    [(512, 256, 64, 3), (512, 256, 1, 3), (512, 256, 129, 2), (500, 300, 32, 4), (500, 300, 33, 3), (130, 639, 64, 1)],
)
def test_tiles_of_a_prompts_last_rows_keep_all_and_others_what_they_choose(
    num_rows: int, context_len: int, last_tokens: int, choosing: int, kernel: Kernel, device: torch.device
) -> None:
    chunk = make(num_rows, context_len, device)
    index = choose(chunk, kernel, last_tokens=last_tokens, **SETTINGS)
    assert (index.counts[:, choosing:].cpu() == torch.tensor(NOTHING_LEFT_OUT)).all()
    assert (index.counts[:, :choosing, 0] != EVERY_GROUP).any()
    assert index.long_tiles == chunk.num_tiles - choosing, "kernels begin with all of them"
    check_same(index, choose(chunk, kernel, last_tokens=0, **SETTINGS), chunk, range(choosing))
    # Each of the last rows lies in a tile that keeps all, and no tile without one of them does.
    last_choosing = (chunk.first_tile + choosing) * TILE - 1
    assert last_choosing < chunk.seq_len - last_tokens <= last_choosing + TILE


@engines
@pytest.mark.parametrize(
    ("last_tokens", "last_part", "as_many"),
    [(64, 0.2, 153), (64, 0.01, 64), (0, 0.2, 0), (64, 0.9, 512), (600, 0.9, 600)],
)
def test_long_prompts_have_more_last_rows(
    last_tokens: int, last_part: float, as_many: int, kernel: Kernel, device: torch.device
) -> None:
    chunk = make(640, 128, device)
    index = choose(chunk, kernel, last_tokens=last_tokens, last_part=last_part, **SETTINGS)
    same = choose(chunk, kernel, last_tokens=as_many, last_part=0.0, **SETTINGS)
    every = (index.counts[..., 0] == EVERY_GROUP).cpu()
    assert torch.equal(every, (same.counts[..., 0] == EVERY_GROUP).cpu())
    check_same(index, same, chunk, range(chunk.num_tiles - (as_many + TILE - 1) // TILE))


@engines
def test_a_chunk_of_last_rows_alone_chooses_nothing(kernel: Kernel, device: torch.device) -> None:
    chunk = make(100, 306, device)
    index = choose(chunk, kernel, garbage=77, last_tokens=200, **SETTINGS)
    assert (index.counts.cpu() == torch.tensor(NOTHING_LEFT_OUT)).all()


@engines
def test_a_chunk_that_more_of_the_prompt_follows_has_no_last_rows(kernel: Kernel, device: torch.device) -> None:
    chunk = make(200, 306, device, may_end_prompt=False)
    index = choose(chunk, kernel, last_tokens=64, **SETTINGS)
    check_same(index, choose(chunk, kernel, last_tokens=0, **SETTINGS), chunk, range(chunk.num_tiles))
    assert (index.counts[:, -1, 0] != EVERY_GROUP).all()
    assert index.long_tiles == 0
