# SPDX-License-Identifier: Apache-2.0
"""What is attended to where weights are made up: drawn sets that meet the budget, after a choice in full."""

from functools import partial

import pytest
import torch

import benchmarks
from benchmarks import synthetic
from minference_vllm.chunk import Chunk, PagedKV
from minference_vllm.config import MInferenceConfig
from minference_vllm.methods import Block
from minference_vllm.methods.block import BlockSettings
from minference_vllm.ops import Kernel
from minference_vllm.runtime import Runtime
from minference_vllm.scratch import ScratchShape
from minference_vllm.tuning import masses
from minference_vllm.tuning.groups import fine_at
from minference_vllm.tuning.timing import make_state


@pytest.mark.parametrize(("seq_len", "columns", "slashes"), [(8000, 1000, 6096), (8000, 100, 801), (300, 30, 120)])
def test_drawn_sets_meet_the_budget(seq_len, columns, slashes):
    generator = torch.Generator().manual_seed(0)
    vertical = masses.draw_columns(3, seq_len, columns, 30, generator)
    slash = masses.draw_diagonals(3, seq_len, slashes, generator)
    assert (vertical > 0).sum(1).tolist() == [min(columns, seq_len)] * 3
    assert (vertical[:, :30] > 0).all()
    drawn = (slash > 0).sum(1)
    # Where clusters fill nearly the whole length, the last slots find no room.
    assert (drawn <= slashes).all() and (drawn > slashes - 2 * masses.CLUSTER).all()
    assert (slash[:, : slashes // 2] > 0).all()


def test_far_from_full_the_budget_of_diagonals_is_met_exactly():
    slash = masses.draw_diagonals(4, 32768, 6096, torch.Generator().manual_seed(1))
    assert (slash > 0).sum(1).tolist() == [6096] * 4
    assert not torch.equal(slash[0], slash[1])


def test_a_budget_beyond_the_prompt_keeps_everything():
    generator = torch.Generator()
    assert (masses.draw_columns(2, 200, 1000, 30, generator) > 0).all()
    assert (masses.draw_diagonals(2, 200, 6096, generator) > 0).all()
    assert (masses.draw_columns(2, 20, 1000, 30, generator) > 0).all()


def test_an_engine_that_is_given_the_chooser_probes_in_full_and_keeps_the_drawn_sets():
    config = MInferenceConfig.model_validate({"method": benchmarks.vertical_slash(60, 200), "log_every": 0})
    runtime = Runtime(config, torch.device("cpu"), publish=False)
    runtime.chooser = synthetic.make_chooser(seed=7)
    rows, context_len, heads, head_dim = 256, 768, 2, 64
    state = runtime.layer_state(ScratchShape(heads, 1, head_dim, torch.float32, 1024, rows), 0, 1)
    buffers = state.buffers
    cache = torch.randn(64, 1, 16, 2 * head_dim)
    kv = PagedKV(*cache.split(head_dim, dim=-1), torch.arange(64, dtype=torch.int32)[None], 0)

    def columns() -> list[list[int]]:
        q = torch.randn(rows, heads, head_dim)
        buffers.probe.lse.zero_()
        assert runtime.run(partial(Chunk, q, torch.empty_like(q), kv, context_len, 0.1), state)
        assert (buffers.probe.lse != 0).all()
        return buffers.index.columns.tolist()

    first = columns()
    assert first == columns()
    assert first[0][:30] == list(range(30))
    assert (buffers.probe.vertical[:, :1024] > 0).sum(1).tolist() == [60, 60]
    assert (buffers.probe.slash[:, :1024] > 0).sum(1).tolist() == [200, 200]


def test_no_more_boxes_are_scored_than_real_prompts_of_the_length_have_scored(monkeypatch):
    method = Block(BlockSettings(), Kernel.REFERENCE)
    state = make_state(method, ScratchShape(1, 1, 64, torch.float32, 65536, 16), torch.device("cpu"))
    kv = PagedKV(*torch.zeros(1, 1, 16, 128).split(64, dim=-1), torch.zeros(1, 4096, dtype=torch.int32), 0)
    shares = []
    monkeypatch.setattr(Block, "choose", lambda self, *_: shares.append(self.settings.max_fine))
    chooser = synthetic.make_chooser(seed=7)
    for seq_len in (1024, 32768, 65536):
        q = torch.zeros(16, 1, 64)
        chooser(method, Chunk(q, torch.empty_like(q), kv, seq_len - 16, 0.1), state)
    assert shares == [method.settings.max_fine, fine_at(32768), fine_at(65536)]
    assert shares == sorted(shares, reverse=True)


def test_what_is_attended_to_is_drawn_once_for_each_place(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(MInferenceConfig(log_every=0, recall_floor=0.0, row_recall_floor=0.0), torch.device("cpu"), False)
    state = runtime.layer_state(ScratchShape(2, 1, 64, torch.float32, 2048, 512), 0, 1)
    cache = torch.randn(128, 1, 16, 128)
    kv = PagedKV(*cache.split(64, dim=-1), torch.arange(128, dtype=torch.int32)[None], 0)
    draws = []
    draw = synthetic.drawn_choice
    monkeypatch.setattr(synthetic, "drawn_choice", lambda *of: draws.append(of[1].context_len) or draw(*of))
    chooser = synthetic.make_chooser(seed=0)

    def kept(context_len: int) -> torch.Tensor:
        q = torch.randn(256, 2, 64)
        return chooser(runtime.method, Chunk(q, torch.empty_like(q), kv, context_len, 0.1), state).counts[:, :, 0]

    first = kept(1024)
    assert torch.equal(first, kept(1024))
    assert not torch.equal(first, kept(1280))
    assert draws == [1024, 1280]
    assert (first < torch.tensor([64, 72])).all()
