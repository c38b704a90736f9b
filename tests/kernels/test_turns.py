# SPDX-License-Identifier: Apache-2.0
"""Heads that choose in turns, where scratch has no room for all of them."""

from dataclasses import replace

import pytest
import torch

from minference_vllm.chunk import Chunk, PagedKV
from minference_vllm.methods import block
from minference_vllm.methods.block import Block, BlockSettings
from minference_vllm.methods.block_scratch import Heads
from minference_vllm.ops import Kernel
from minference_vllm.scratch import MASS_BYTES, ScratchShape
from tests.kernels.blocks import BF16, SPARSE
from tests.kernels.cases import make_chunk
from tests.kernels.test_block import assert_same_choice, choose


@pytest.mark.parametrize("heads", [Heads(1, 1), Heads(2, 1), Heads(4, 1), Heads(8, 2)], ids=str)
@pytest.mark.parametrize("coarse_from", [0, 10_000], ids=["coarse first", "fine only"])
def test_heads_in_turns_choose_what_all_at_once_do(
    heads: Heads, coarse_from: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = make_chunk(replace(SPARSE, num_qo_heads=12, num_kv_heads=3, num_rows=30), device)
    settings = dict(long_from=0, sink_tokens=16, local_tokens=32, share=0.5, max_density=1.0, coarse_from=coarse_from)
    at_once = choose(chunk, Kernel.TRITON, **settings)
    monkeypatch.setattr(block, "turns", lambda *_: [heads])
    assert_same_choice(choose(chunk, Kernel.TRITON, **settings), at_once, chunk)


def heads_at_once(num_qo_heads: int, num_kv_heads: int, max_len: int, seq_len: int, rows: int = 16_384) -> int:
    """How many heads of a prompt choose at once on a server whose longest prompt has max_len tokens."""
    method, meta = Block(BlockSettings(), Kernel.TRITON), torch.device("meta")
    shape = ScratchShape(num_qo_heads, num_kv_heads, 128, BF16, max_len, 16_384)
    kv = PagedKV(*[torch.empty(9, num_kv_heads, 16, 128, dtype=BF16, device=meta)] * 2, torch.zeros(1, 1).int(), 0)
    q = torch.empty(rows, num_qo_heads, 128, dtype=BF16, device=meta)
    chunk = Chunk(q, torch.empty_like(q), kv, seq_len - rows, 1.0, may_end_prompt=False)
    scratch = method.scratch(shape, meta)
    assert scratch.masses.nbytes <= MASS_BYTES
    return len(method.buffers(chunk, scratch).masses)


MILLION = 2**20


@pytest.mark.parametrize(
    ("heads", "max_len", "seq_len", "rows", "at_once"),
    [
        ((32, 8), 131_072, 131_072, 16_384, 32),
        ((32, 8), MILLION, MILLION, 16_384, 4),
        ((32, 8), MILLION, MILLION // 2, 16_384, 8),
        ((32, 8), MILLION, 131_072, 16_384, 32),
        ((32, 8), MILLION, 30_000, 5_000, 32),
        ((64, 8), MILLION, MILLION, 16_384, 4),
        ((28, 4), MILLION, MILLION, 16_384, 1),
        ((14, 2), 262_144, 262_144, 16_384, 14),
        ((40, 10), 2 * 131_072, 2 * 131_072, 16_384, 16),
    ],
    ids=str,
)
def test_short_prompts_of_a_server_for_long_ones_choose_for_more_heads_at_once(
    heads: tuple[int, int], max_len: int, seq_len: int, rows: int, at_once: int
) -> None:
    assert heads_at_once(*heads, max_len, seq_len, rows) == at_once


def test_a_prompt_longer_than_scratch_was_made_for_is_refused() -> None:
    with pytest.raises(ValueError, match="no room for 16384 rows of a prompt of 262144 tokens"):
        heads_at_once(8, 2, 65_536, 262_144)
