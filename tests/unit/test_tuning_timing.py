# SPDX-License-Identifier: Apache-2.0
"""What `minference-vllm tune` times: the keys that are attended to, and how medians are taken."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from minference_vllm import compat, debug, ops
from minference_vllm.attention import choose, prefill
from minference_vllm.chunk import FP8, Chunk, PagedKV
from minference_vllm.config import MInferenceConfig
from minference_vllm.index import EVERY_GROUP, GROUP, HALVES, TILE, HeadIndex, SparseIndex, TileIndex
from minference_vllm.methods import Block, Method, VerticalSlash
from minference_vllm.methods.block import BlockSettings
from minference_vllm.methods.vertical_slash import VerticalSlashSettings
from minference_vllm.ops import Kernel
from minference_vllm.reference.attend import kept_by_tile
from minference_vllm.reference.dense import dense
from minference_vllm.scratch import ProbeBuffers, ScratchShape
from minference_vllm.tuning import groups, timing
from minference_vllm.tuning.drawn import drawn_choice
from minference_vllm.tuning.heads import Heads
from minference_vllm.tuning.masses import KeySets

CPU = torch.device("cpu")


@pytest.mark.parametrize("has_fp8_kv", [False, True])
def test_both_ways_attend_to_the_same_chunk(has_fp8_kv: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attention(
        q: Any, k: Any, v: Any, out: Any, block_table: Any, max_seqlen_k: int, softmax_scale: float, **more: Any
    ) -> None:
        assert (q.dtype == k.dtype == v.dtype == FP8) == has_fp8_kv
        scales = [more[f"{name}_descale"][0] if has_fp8_kv else None for name in "qkv"]
        kv = PagedKV(k.transpose(1, 2), v.transpose(1, 2), block_table, 0, *scales[1:])
        dense(q, kv, max_seqlen_k - len(q), softmax_scale, out, scales[0])

    monkeypatch.setattr(compat, "flash_attention", lambda head_dim: flash_attention)
    everything = MInferenceConfig(method=VerticalSlashSettings(vertical_size=512, slash_size=512))
    layer = timing.Layer(Heads(4, 2, 64), everything, CPU, max_len=512, chunk=128, has_fp8_kv=has_fp8_kv)
    for tokens in (100, 300, 512):
        expected, found = (run().clone() for run in layer.attentions(tokens))
        assert len(found) == min(tokens, 128)
        torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("share", [None, 0.9])
def test_vertical_slash_probes_in_full_and_attends_to_drawn_keys(share: float | None) -> None:
    heads, rows, context_len = 2, 128, 384
    fixed = VerticalSlash(VerticalSlashSettings(vertical_size=60, slash_size=150), Kernel.REFERENCE)
    method = VerticalSlash(fixed.settings.model_copy(update={"share": share}), Kernel.REFERENCE)
    shape = ScratchShape(heads, 1, 64, torch.float32, max_seq_len=512, max_chunk=rows)
    probed, drawn = (timing.make_state(method, shape, CPU) for _ in range(2))
    cache = torch.randn(32, 1, 16, 128)
    kv = PagedKV(*cache.split(64, dim=-1), torch.arange(32, dtype=torch.int32)[None], 0)
    q = torch.randn(rows, heads, 64)
    chunk = Chunk(q, torch.empty_like(q), kv, context_len, 0.125)
    index = prefill(chunk, method, drawn, drawn_choice(method, chunk, drawn, seed=7))
    choose(method, chunk, probed)
    assert torch.equal(drawn.buffers.probe.vertical, probed.buffers.probe.vertical)
    assert torch.equal(drawn.buffers.probe.slash, probed.buffers.probe.slash)
    KeySets(7).overwrite(probed.buffers.probe, chunk.seq_len, method.settings)
    # With a share too, all that is drawn and nothing else.
    expected = fixed.index_masses(chunk.seq_len, fixed.budgets(heads, CPU), probed.buffers)
    assert torch.equal(index.columns, expected.columns)
    assert torch.equal(index.bands_indptr, expected.bands_indptr)


def test_for_a_share_without_bounds_the_sizes_that_go_without_one_are_drawn() -> None:
    probe = ProbeBuffers.allocate(1, 64, 8000, CPU)
    KeySets(7).overwrite(probe, 8000, VerticalSlashSettings(share=0.9))
    assert [(mass > 0).sum().item() for mass in (probe.vertical, probe.slash)] == [1000, 6096]


def test_a_method_for_which_nothing_is_drawn_chooses_by_itself() -> None:
    method = Mock(spec=Method)
    assert drawn_choice(method, None, None, seed=0) is choose  # type: ignore[arg-type] # of neither anything is read


def test_times_are_medians_of_runs_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    def run(name: str, *takes: float) -> Callable[[], torch.Tensor]:
        left = [*[99.0] * timing.WARM_UPS, *takes]

        def take() -> torch.Tensor:
            clock[0] += left.pop(0)
            order.append(name)
            return torch.empty(0)

        return take

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert timing.median_ms([run("a", 5, 1, 2), run("b", 3, 9, 4)], repeats=3) == [2.0, 4.0]
    assert "".join(order) == "ab" * (timing.WARM_UPS + 3)


@pytest.mark.parametrize(("rows", "context_len"), [(512, 1536), (300, 1000), (100, 0), (1, 128)])
def test_block_chooses_in_full_and_attends_to_drawn_groups(rows: int, context_len: int) -> None:
    method = Block(BlockSettings(), Kernel.REFERENCE)
    shape = ScratchShape(2, 1, 64, torch.float32, max_seq_len=2048, max_chunk=rows)
    state = timing.make_state(method, shape, CPU)
    cache = torch.randn(128, 1, 16, 128)
    kv = PagedKV(*cache.split(64, dim=-1), torch.arange(128, dtype=torch.int32)[None], 0)
    q = torch.randn(rows, 2, 64)
    chunk = Chunk(q, torch.empty_like(q), kv, context_len, 0.125, may_end_prompt=False)
    index = prefill(chunk, method, state, drawn_choice(method, chunk, state, seed=7))
    debug.check_index(chunk, index, state)
    debug.check_output(chunk, state)
    assert (state.buffers.means != 0).any(), "the method has chosen, too"
    for tile in range(chunk.num_tiles):
        before = (chunk.first_tile + tile) * TILE
        forced = {*range(min(64, before))} | {*range(max(before - 128, 0), before)}
        for half in range(HALVES):
            kept = {*kept_by_tile(index, 1, tile + chunk.first_tile, half, chunk.first_tile).tolist()}
            assert kept >= forced
            assert len(kept) == max(len(forced), round(groups.density_at(chunk.seq_len) * before / GROUP) * GROUP)


def test_the_guard_attends_again_for_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs what it costs in service, where most chunks have no head below a floor."""
    monkeypatch.setattr(compat, "flash_attention", lambda head_dim: None)
    layer = timing.Layer(Heads(4, 2, 64), MInferenceConfig(), CPU, max_len=2048, chunk=256)
    launched: list[SparseIndex] = []
    attend = ops.attend
    monkeypatch.setattr(ops, "attend", lambda chunk, index, *of: launched.append(index) or attend(chunk, index, *of))
    _, sparse = layer.attentions(2048)
    sparse()
    [chosen, again] = launched
    assert isinstance(chosen, TileIndex) and isinstance(again, HeadIndex)
    assert again.num_heads.item() == 0
    assert layer.state.guard and layer.state.guard.totals.chunks.item() == 1


def test_drawn_groups_are_all_where_the_last_rows_of_a_prompt_are() -> None:
    method, cache = Block(BlockSettings(), Kernel.REFERENCE), torch.randn(128, 1, 16, 128)
    kv = PagedKV(*cache.split(64, dim=-1), torch.arange(128, dtype=torch.int32)[None], 0)
    q = torch.randn(512, 2, 64)
    counts = groups.draw_groups(Chunk(q, torch.empty_like(q), kv, 1536, 0.125), method, 7).counts
    assert counts[:, -1].tolist() == [[EVERY_GROUP, 0, 0]] * 2
    assert (counts[:, :-1, 0] > 0).all()


def test_longer_prompts_keep_a_smaller_share() -> None:
    assert [round(groups.density_at(tokens), 3) for tokens in (100, 3_657, 28_200, 131_072)] == [
        1.0, 0.411, 0.148, 0.088,
    ]  # fmt: skip
