# SPDX-License-Identifier: Apache-2.0
"""What a candidate is measured to do and to cost is what it does and costs."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from minference_vllm import compat, ops
from minference_vllm.attention import LayerState, choose, prefill
from minference_vllm.index import TILE
from minference_vllm.methods import Block
from minference_vllm.methods.block import BlockSettings
from minference_vllm.methods.vertical_slash import VerticalSlashSettings
from minference_vllm.ops import Kernel
from minference_vllm.patterns.shared import SHARES, SIZES
from minference_vllm.recall import Floors
from minference_vllm.scratch import AttendBuffers
from minference_vllm.search import meter as meter_module
from minference_vllm.search.candidates import CANDIDATES, DEFAULT, ROUGH
from minference_vllm.search.contender import Contender
from minference_vllm.search.meter import TRIES, Meter
from minference_vllm.search.pairs import every_key, worked_pairs
from tests.kernels.cases import make_chunk
from tests.unit.search.model import CASE, CPU, INDICES, chunks, ground

pytestmark = pytest.mark.usefixtures("short_prompts_drop_as_much")

BLOCK = Block(BlockSettings(), Kernel.REFERENCE)


def attend() -> AttendBuffers:
    return AttendBuffers.allocate(CASE.num_qo_heads, CASE.shape.max_chunk, CPU)


def read(meter: Meter) -> list[torch.Tensor]:
    """A prompt's outputs, both layers read with a meter in the chooser's place."""
    outputs = []
    for position in INDICES:
        layer = LayerState(position, torch.empty(0), None, attend())
        for chunk in chunks((7,), position):
            prefill(chunk, BLOCK, layer, meter)
            outputs.append(chunk.out.clone())
    return outputs


def test_the_default_and_the_rough_candidate_are_among_those_of_block() -> None:
    heads = CANDIDATES[SHARES].heads
    assert BlockSettings().share == DEFAULT
    assert {DEFAULT, ROUGH} <= set(heads)
    assert list(heads) == sorted(heads)


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_fits_the_scratch_of_all(name: str) -> None:
    candidates = CANDIDATES[name]
    for head in candidates.heads:
        alone = candidates.shared.settings([head])
        assert isinstance(alone, BlockSettings | VerticalSlashSettings)
        if name == SIZES:
            assert alone.vertical_size <= candidates.settings.vertical_size
            assert alone.slash_size <= candidates.settings.slash_size


def test_every_key_is_dense_attention() -> None:
    chunk, buffers = make_chunk(CASE, CPU), attend()
    ops.attend(chunk, every_key(chunk), buffers, Kernel.REFERENCE)
    assert buffers.kept_pairs.item() == CASE.num_qo_heads * chunk.causal_pairs


@pytest.mark.parametrize("name", CANDIDATES)
def test_pairs_are_those_that_are_attended_to(name: str) -> None:
    """Of whole tiles: the last rows of a prompt that ends within a tile count as many."""
    chunk = make_chunk(CASE, CPU)
    whole = type(chunk)(chunk.q[:640], chunk.out[:640], chunk.kv, 0, chunk.scale)
    for contender in ground().of_candidates(CANDIDATES[name]):
        layer, buffers = contender.layers[0], attend()
        index = choose(contender.method, whole, layer)
        ops.attend(whole, index, buffers, Kernel.REFERENCE)
        worked, kept = float(worked_pairs(index, whole).sum()), buffers.kept_pairs.item()
        # What a column and a band both hold is loaded twice and attended to once.
        assert worked == kept if name == SHARES else worked >= kept
    assert worked_pairs(every_key(whole), whole).tolist() == [whole.causal_pairs] * CASE.num_qo_heads


def test_the_prompt_itself_is_read_with_all_keys() -> None:
    exact = read(Meter([], attend(), 0))
    for tried in ground().of_candidates(CANDIDATES[SHARES])[:1]:
        assert all(map(torch.equal, read(Meter([tried], attend(), 0)), exact))
    for out, chunk in zip(exact, [chunk for at in INDICES for chunk in chunks((7,), at)], strict=True):
        ops.attend(chunk, every_key(chunk), attend(), Kernel.REFERENCE)
        assert torch.equal(out, chunk.out)


def test_errors_are_of_each_head_and_fall_with_what_it_keeps() -> None:
    few = replace(CANDIDATES[SHARES], heads=CANDIDATES[SHARES].heads[::3])
    contenders = ground().of_candidates(few)
    meter = Meter(contenders, attend(), 0)
    exact = read(meter)
    for position, of_layer in zip(INDICES, (exact[:2], exact[2:]), strict=True):
        layer = meter.trials()[position]
        tiles = -(-CASE.num_rows // TILE)
        assert layer.dense == CASE.num_qo_heads * tiles * TILE * (tiles * TILE + 1) / 2
        assert layer.norm == pytest.approx(float(torch.cat(of_layer).square().sum()))
        trials = [trial for trial in layer.trials if trial is not None]
        assert len(trials) == len(contenders)
        costs = [trial.attending for trial in trials]
        assert costs == sorted(costs)
        for head in range(CASE.num_qo_heads):
            assert trials[0].errors[head] > trials[-1].errors[head]
    # By hand, of one candidate in the last layer.
    squares = torch.zeros(CASE.num_qo_heads)
    for chunk, expected in zip(chunks((7,), 2), exact[2:], strict=True):
        prefill(chunk, contenders[1].method, contenders[1].layers[2])
        squares += (chunk.out - expected).square().sum((0, 2))
    found = meter.trials()[2].trials[1]
    assert found is not None
    assert found.errors == pytest.approx(squares.tolist(), rel=1e-4)


def test_heads_that_the_guard_repairs_have_no_error_and_work_twice() -> None:
    """A candidate that keeps too little is not as cheap as it looks."""
    candidates = replace(CANDIDATES[SHARES], heads=CANDIDATES[SHARES].heads[:1])
    trials = []
    for floors in (Floors(0.0, 0.0), Floors(1.0, 0.0)):
        meter = Meter(ground(floors).of_candidates(candidates), attend(), 0)
        read(meter)
        trials.append(meter.trials()[0].trials[0])
    lost, repaired = trials
    assert lost is not None and repaired is not None
    assert max(repaired.errors) < 1e-6 < min(lost.errors)
    all_pairs = sum(float(worked_pairs(every_key(chunk), chunk)[0]) for chunk in chunks((7,), 0))
    assert repaired.pairs == tuple(pairs + all_pairs for pairs in lost.pairs)


def test_a_layer_that_a_contender_keeps_dense_is_no_trial() -> None:
    block = ground().of_candidates(CANDIDATES[SHARES])[0]
    meter = Meter([Contender(block.method, {0: block.layers[0]})], attend(), 0)
    read(meter)
    trials = meter.trials()
    assert trials[0].trials[0] is not None
    assert trials[2].trials == (None,)


class Clock:
    """In place of CUDA's events: each mark is later than the one before by as much as has been worked on since."""

    now = 0.0
    slept = 0
    waited = False
    late = 0
    """How many runs from now on are launched too late."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = -1.0

    def record(self) -> None:
        self.at, Clock.waited = Clock.now, False

    def query(self) -> bool:
        """Whether the device has come here: before the host had launched all that follows, then."""
        if not Clock.late:
            return False
        Clock.late -= 1
        return True

    def elapsed_time(self, end: "Clock") -> float:
        assert Clock.waited, "the device may not have come so far"
        return end.at - self.at


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Clock]]:
    """Choosing takes 1 ms the first time, and each time more; attending 10, FlashAttention 100."""
    chosen = itertools.count(1)

    def choosing(*arguments: Any) -> Any:
        Clock.now += next(chosen)
        return choose(*arguments)

    def attending(*arguments: Any) -> None:
        Clock.now += 10
        attend_by_reference(*arguments)

    def flash_attention(out: torch.Tensor, **_: Any) -> None:
        Clock.now += 100

    def wait() -> None:
        Clock.waited = True

    def sleep(cycles: int) -> None:
        Clock.slept += 1
        Clock.now += 10**6

    attend_by_reference = ops.attend
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep, raising=False)
    monkeypatch.setattr(compat, "flash_attention", lambda head_dim: flash_attention)
    monkeypatch.setattr(meter_module, "choose", choosing)
    monkeypatch.setattr(ops, "attend", attending)
    Clock.now, Clock.slept, Clock.waited, Clock.late = 0.0, 0, False, 0
    yield Clock


def test_times_are_medians_of_each_step_without_the_warm_up(clock: type[Clock]) -> None:
    contenders = ground().of_candidates(replace(CANDIDATES[SHARES], heads=(ROUGH, DEFAULT)))
    meter = Meter(contenders, attend(), 3)
    layer = LayerState(0, torch.empty(0), None, attend())
    chunk = chunks((7,), 0)[0]
    meter(BLOCK, chunk, layer)
    found = meter.trials()[0]
    assert found.dense == 100.0
    first, second = found.trials
    assert first is not None and second is not None
    # Choosing was called for the 2nd to 4th time, then for the 6th to 8th: the 1st and the 5th warmed up.
    assert (first.choosing, second.choosing) == (3.0, 7.0)
    assert (first.attending, second.attending) == (10.0, 10.0)
    assert clock.slept == 3 * 3
    # What is tried leaves nothing in the prompt's own output, and its errors are the same with a clock as without.
    untimed = Meter(contenders, attend(), 0)
    untimed(BLOCK, chunk, layer)
    without = untimed.trials()[0].trials[0]
    assert without is not None
    assert without.errors == first.errors
    assert without.pairs == first.pairs


@pytest.mark.parametrize(("late", "slept"), [(0, 2), (1, 3), (2, 4), (100, 2 * TRIES)])
def test_a_run_that_is_launched_too_late_is_timed_again(clock: type[Clock], late: int, slept: int) -> None:
    meter = Meter([], attend(), 2)
    clock.late = late
    meter(BLOCK, chunks((7,), 0)[0], LayerState(0, torch.empty(0), None, attend()))
    assert clock.slept == slept
    assert meter.trials()[0].dense == 100.0
