# SPDX-License-Identifier: Apache-2.0
"""A search from end to end: measures, chooses, fits the choice to the default's cost, and checks on other prompts."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minference_vllm.errors import ConfigError
from minference_vllm.methods.block import BlockSettings
from minference_vllm.patterns import DENSE, PatternFile
from minference_vllm.patterns.file import Provenance, parse_pattern
from minference_vllm.patterns.shared import SHARES
from minference_vllm.scratch import AttendBuffers
from minference_vllm.search.candidates import CANDIDATES, DEFAULT, ROUGH, Candidates
from minference_vllm.search.choice import Choice, LayerOptions, choose
from minference_vllm.search.contender import Contender
from minference_vllm.search.journal import Journal
from minference_vllm.search.meter import LayerTrials, Meter
from minference_vllm.search.options import Measured, layer_options, total_cost, weights
from minference_vllm.search.prompts import Prompt, Prompts
from minference_vllm.search.reader import Reader
from minference_vllm.search.verdict import Verdict

FITS = 4
"""How often a choice is measured as a whole. After each time, the next choice gets a budget corrected by the result."""

LEAST, AIM, MOST = 0.97, 0.99, 1.01
"""A choice's cost relative to the one aimed at: from LEAST to MOST it is accepted, else the next choice aims at AIM."""

CHECKS = 2
"""How often a choice is checked. If the first is better on other prompts but costs more there, the second is fitted to
cost as much less. Only costs of these prompts are used for that, so how far it diverges there is still news."""

Say = Callable[[str], None]
"""Is told after each step what has been done."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        file: the best file, whether or not it is better than the default.
        verdict: on prompts that it was not searched with.
    """

    file: PatternFile
    verdict: Verdict


class Search:
    """The search for one model's pattern file.

    Args:
        reader: the model.
        prompts: to search and to check with.
        methods: names of the methods to try.
        repeats: timed runs of each candidate; 0 counts pairs in place of times.
    """

    def __init__(self, reader: Reader, prompts: Prompts, methods: Sequence[str], repeats: int) -> None:
        self._reader, self._ground, self._prompts = reader, reader.ground, prompts
        self._methods, self._repeats = tuple(dict.fromkeys(methods)), repeats
        self._say: Say = lambda done: None
        shape, device = self._ground.shape, self._ground.device
        self._attend = AttendBuffers.allocate(shape.num_qo_heads, shape.max_chunk, device)
        self._default = self._ground.of_settings(BlockSettings())
        self._exact = Contender(self._default.method, {})
        # Errors are weighed by a candidate of block, whichever methods are tried.
        self._contenders: list[Contender] = []
        self._numbers: dict[str, range] = {}
        for name in dict.fromkeys((SHARES, *methods)):
            first = len(self._contenders)
            self._contenders += self._ground.of_candidates(CANDIDATES[name])
            self._numbers[name] = range(first, len(self._contenders))

    @property
    def num_steps(self) -> int:
        """How often `say` is called if the first check is enough."""
        layers, prompts = len(self._ground.indices), self._prompts
        return len(prompts.searching) * (1 + layers) + len(self._methods) + len(prompts.checking)

    def run(self, name: str, provenance: Provenance, journal: Journal, say: Say) -> Found:
        """Search, and check what was found.

        Args:
            name: of the model, in the file.
            provenance: of the file; the verdict is added to its notes.
            journal: keeps the measurements, including those of an earlier run.
            say: is told of progress.

        Raises:
            ConfigError: no choice of these methods costs as little as the default.
        """
        self._say = say
        measured, kls = self._try_candidates(journal), self._weigh_layers(journal)
        weight = weights(measured, kls, self._number(ROUGH))
        budget = sum(total_cost(layers, self._number(DEFAULT)) for layers in measured) / len(measured)

        def write(candidates: Candidates, choice: Choice) -> PatternFile:
            return self._file(name, provenance, candidates, choice)

        options = {name: layer_options(measured, weight, self._numbers[name]) for name in self._methods}
        found, aim = None, 1.0
        for _ in range(CHECKS):
            fits = [
                fit
                for method, of_method in options.items()
                for fit in self._fit(CANDIDATES[method], of_method, budget, aim, write)
            ]
            if not fits:
                break
            _, file = min(fits, key=lambda fit: fit[0])
            found = _noted(file, self._check(file))
            if not found.verdict.diverges_less or not found.verdict.costs_more:
                break
            aim /= found.verdict.cost_ratio
        if found is None:
            raise ConfigError("No choice of these methods costs as little as the default: nothing is written.")
        return found

    def _number(self, share: float) -> int:
        """The number of the contender that keeps this share."""
        return self._numbers[SHARES][CANDIDATES[SHARES].heads.index(share)]

    def _try_candidates(self, journal: Journal) -> Measured:
        """The results of all candidates in all layers, by prompt."""
        known = journal.trials()
        for number, prompt in enumerate(self._prompts.searching):
            if number not in known:
                known[number] = self._meter(prompt, self._contenders)
                journal.add_trials(number, known[number])
            self._say(f"candidates, prompt {number}")
        return [known[number] for number in range(len(self._prompts.searching))]

    def _weigh_layers(self, journal: Journal) -> list[dict[int, float]]:
        """The effect of the rough candidate in one layer alone on the next tokens, by prompt and layer position."""
        rough, measured = self._contenders[self._number(ROUGH)], journal.kls()
        found = []
        for number, prompt in enumerate(self._prompts.searching):
            known = {at: kl for (of, at), kl in measured.items() if of == number}
            exact = None
            for position, layer in rough.layers.items():
                if position not in known:
                    exact = self._reader.read(prompt, self._exact) if exact is None else exact
                    states = self._reader.read(prompt, Contender(rough.method, {position: layer}))
                    known[position] = self._reader.divergence(exact, states)
                    journal.add_kl(number, position, known[position])
                self._say(f"layer {position}, prompt {number}")
            found.append(known)
        return found

    def _fit(
        self,
        candidates: Candidates,
        options: Sequence[LayerOptions],
        budget: float,
        aim: float,
        write: Callable[[Candidates, Choice], PatternFile],
    ) -> list[tuple[float, PatternFile]]:
        """The choice that costs `aim` times what the default does, with its expected harm; empty if all cost more.

        It is measured and corrected, because heads with different candidates in a layer do not cost exactly what each
        costs when all heads have the same one.
        """
        target, ratio = budget * aim, math.inf
        best: list[tuple[float, PatternFile]] = []
        for _ in range(FITS):
            choice = choose(options, target)
            if choice is None:
                break
            file = write(candidates, choice)
            ratio = self._cost_ratio(file) / aim
            if ratio <= MOST and (not best or choice.harm < best[0][0]):
                best = [(choice.harm, file)]
            if LEAST <= ratio <= MOST:
                break
            target *= AIM / ratio
        self._say(f"fit of {candidates.name}, {ratio * aim:.3f} of the default's cost")
        return best

    def _cost_ratio(self, file: PatternFile) -> float:
        """A file's cost relative to the default's."""
        pair = [self._ground.of_file(file), self._default]
        costs = [self._costs(prompt, pair) for prompt in self._prompts.searching]
        ours, default = (sum(cost[at] for cost in costs) for at in (0, 1))
        return ours / default

    def _check(self, file: PatternFile) -> Verdict:
        """Compares the file with the default as they are served, on prompts that were not used for the search."""
        ours, default = self._ground.of_file(file), self._default
        kls: tuple[list[float], list[float]] = ([], [])
        costs = [0.0, 0.0]
        for number, prompt in enumerate(self._prompts.checking):
            exact = self._reader.read(prompt, self._exact)
            for at, contender in enumerate((default, ours)):
                kls[at].append(self._reader.divergence(exact, self._reader.read(prompt, contender)))
            costs = [old + new for old, new in zip(costs, self._costs(prompt, [default, ours]), strict=True)]
            self._say(f"check, prompt {number}")
        return Verdict(kls[0], kls[1], costs[0], costs[1], "ms" if self._repeats else "pairs")

    def _costs(self, prompt: Prompt, contenders: Sequence[Contender]) -> list[float]:
        layers = self._meter(prompt, contenders)
        return [total_cost(layers, at) for at in range(len(contenders))]

    def _meter(self, prompt: Prompt, contenders: Sequence[Contender]) -> dict[int, LayerTrials]:
        meter = Meter(contenders, self._attend, self._repeats)
        self._reader.read(prompt, meter)
        return meter.trials()

    def _file(self, name: str, provenance: Provenance, candidates: Candidates, choice: Choice) -> PatternFile:
        """A choice as a pattern file; layers that can never run sparse are dense."""
        layers: list[Any] = [DENSE] * self._reader.geometry.num_layers
        for index, chosen in zip(self._ground.indices.values(), choice.layers, strict=True):
            if chosen is not None:
                layers[index] = [candidates.heads[at] for at in chosen]
        content = {
            "version": 1,
            "models": [name],
            "geometry": self._reader.geometry.model_dump(),
            "provenance": provenance.model_dump(),
            "method": candidates.shared.model_dump(),
            "layers": layers,
        }
        return parse_pattern(json.dumps(content), "that was searched")


def _noted(file: PatternFile, verdict: Verdict) -> Found:
    """A file that says how it was judged."""
    provenance = file.provenance.model_copy(update={"notes": (*file.provenance.notes, verdict.sentence())})
    return Found(file.model_copy(update={"provenance": provenance}), verdict)
