# SPDX-License-Identifier: Apache-2.0
"""Tries contenders on every layer of a prompt, while the prompt itself is read with all keys."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from minference_vllm import compat, ops
from minference_vllm.attention import LayerState, choose, prefill
from minference_vllm.chunk import Chunk
from minference_vllm.index import SparseIndex
from minference_vllm.methods import Method
from minference_vllm.scratch import AttendBuffers
from minference_vllm.search.contender import Contender
from minference_vllm.search.pairs import every_key, redone_pairs, worked_pairs
from minference_vllm.tuning.timing import dense_attention

Marks = tuple[torch.cuda.Event, ...]

CYCLES = 2_000_000_000
"""GPU clock cycles a second, no fewer than on any GPU that is supported."""

LONGEST_WAIT_S = 0.01
"""A first launch may have to compile a kernel, which says nothing about the launches that follow."""


TRIES = 4
"""How often a run is timed until it is launched in time. If it never is, which hardly happens, its time is kept: the
median of several runs is taken."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of one contender in one layer.

    Attributes:
        choosing, attending: its costs in ms, or in pairs worked on where no time is taken.
        pairs: those that each head worked on, both times if the guard had it attend to all keys.
        errors: squared difference of each head's output from dense attention's.
    """

    choosing: float
    attending: float
    pairs: tuple[float, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LayerTrials:
    """The results of all contenders in one layer.

    Attributes:
        dense: the cost of dense attention, in the unit of Trial's costs.
        norm: square of dense attention's output, of all heads.
        trials: in the contenders' order; None where a contender keeps the layer dense.
    """

    dense: float
    norm: float
    trials: tuple[Trial | None, ...]


@dataclass(slots=True)
class _Layer:
    """What has been measured so far; tensors are on the device."""

    norm: Any = 0.0
    dense_pairs: Any = 0.0
    dense: list[list[Marks]] = field(default_factory=list)
    marks: list[list[list[Marks]]] = field(default_factory=list)
    pairs: list[Any] = field(default_factory=list)
    errors: list[Any] = field(default_factory=list)


class Meter:
    """A chooser that keeps all keys, and beside that has every contender attend to the same chunk.

    Args:
        contenders: to try.
        attend: buffers for what attending to all keys writes beside the output.
        repeats: timed runs of each contender and chunk; 0 takes no times.
    """

    def __init__(self, contenders: Sequence[Contender], attend: AttendBuffers, repeats: int) -> None:
        self._contenders = contenders
        self._attend = attend
        self._repeats = repeats
        self._layers: dict[int, _Layer] = {}

    def __call__(self, method: Method, chunk: Chunk, layer: LayerState) -> SparseIndex:
        """See attention.Chooser."""
        everything = every_key(chunk)
        found = self._layers.setdefault(layer.position, self._empty())
        exact, tried = (replace(chunk, out=torch.empty_like(chunk.out)) for _ in range(2))
        ops.attend(exact, everything, self._attend, method.kernel)
        found.norm = found.norm + exact.out.float().square().sum(dtype=torch.float64)
        found.dense_pairs = found.dense_pairs + worked_pairs(everything, chunk).sum()
        if self._repeats:
            found.dense.append(self._time_dense(tried))
        for number, contender in enumerate(self._contenders):
            ours = contender.layers.get(layer.position)
            if ours is not None:
                pairs, marks = self._try(contender, tried, ours)
                found.marks[number].append(marks)
                found.pairs[number] = found.pairs[number] + pairs
                difference = (tried.out.float() - exact.out.float()).square().sum((0, 2))
                found.errors[number] = found.errors[number] + difference.double()
        return everything

    def _time_dense(self, chunk: Chunk) -> list[Marks]:
        """What a dense layer costs: vLLM's FlashAttention."""
        dense = dense_attention(chunk, compat.flash_attention(chunk.head_dim))

        def run(mark: Callable[[], None]) -> None:
            mark()
            dense()
            mark()

        return self._timed(run)

    def _try(self, contender: Contender, chunk: Chunk, layer: LayerState) -> tuple[torch.Tensor, list[Marks]]:
        """Choose and attend as in service, guard included; `chunk.out` and each head's pairs are the last run's."""
        index = None

        def run(mark: Callable[[], None]) -> None:
            def marked(method: Method, chunk: Chunk, layer: LayerState) -> SparseIndex:
                chosen = choose(method, chunk, layer)
                mark()
                return chosen

            nonlocal index
            mark()
            index = prefill(chunk, contender.method, layer, marked)
            mark()

        marks = self._timed(run)
        assert index is not None
        pairs, num_rows = worked_pairs(index, chunk), contender.method.choosing_rows(chunk)
        if layer.guard is not None and num_rows:
            pairs += redone_pairs(chunk.of_rows(0, num_rows), layer.guard.buffers)
        return pairs, marks

    def _timed(self, run: Callable[[Callable[[], None]], Any]) -> list[Marks]:
        """Run once to warm up, and then, if times are taken, under the clock."""
        if self._repeats:
            torch.cuda.synchronize()  # or launching would wait for room in the queue
        start = time.perf_counter()
        run(lambda: None)
        # Launching takes about as long as it did for this run.
        wait = 2 * min(time.perf_counter() - start, LONGEST_WAIT_S)
        spans = []
        for _ in range(self._repeats):
            for _ in range(TRIES):
                marks = _behind(wait, run)
                if not marks[0].query():
                    break
                # The host was late: the device may have waited for it between two marks.
                wait *= 2
            spans.append(marks)
        return spans

    def _empty(self) -> _Layer:
        count = len(self._contenders)
        return _Layer(marks=[[] for _ in range(count)], pairs=[0.0] * count, errors=[0.0] * count)

    def trials(self) -> dict[int, LayerTrials]:
        """What was measured, by the layer's position; it waits for the device."""
        if self._repeats:
            torch.cuda.synchronize()
        return {position: self._layer_trials(found) for position, found in sorted(self._layers.items())}

    def _layer_trials(self, found: _Layer) -> LayerTrials:
        dense = _milliseconds(found.dense, 0) if self._repeats else float(found.dense_pairs)
        return LayerTrials(dense, float(found.norm), tuple(self._trial(found, at) for at in range(len(found.pairs))))

    def _trial(self, found: _Layer, number: int) -> Trial | None:
        if not found.marks[number]:
            return None
        pairs, errors = tuple(found.pairs[number].tolist()), tuple(found.errors[number].tolist())
        if not self._repeats:
            return Trial(0.0, sum(pairs), pairs, errors)
        choosing, attending = (_milliseconds(found.marks[number], at) for at in (0, 1))
        return Trial(choosing, attending, pairs, errors)


def _behind(wait: float, run: Callable[[Callable[[], None]], Any]) -> Marks:
    """The marks of a run that is launched while the device waits so many seconds, so that Python's time does not count.

    The device comes to the first mark when it has waited.
    """
    marks: list[torch.cuda.Event] = []

    def mark() -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        marks.append(event)

    torch.cuda._sleep(int(wait * CYCLES))
    run(mark)
    return tuple(marks)


def _milliseconds(chunks: Sequence[Sequence[Marks]], step: int) -> float:
    """Milliseconds of the step between two marks: the median of each chunk's runs, summed over the chunks."""
    return sum(statistics.median(marks[step].elapsed_time(marks[step + 1]) for marks in runs) for runs in chunks)
