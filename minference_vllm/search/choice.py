# SPDX-License-Identifier: Apache-2.0
"""Which candidate each head gets: the least harm within a budget of cost.

Once cost has a price in units of harm, heads and layers are independent of each other, and the best choice for each is
easy to find. Bisection finds the lowest price at which all of these choices together stay within the budget. Candidates
are coarse steps, so part of the budget may be left; it is spent on the change that then helps most for its cost.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

BISECTIONS = 60
"""The price is then known to 2^-60 of the interval in which it was searched for."""


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate for a head: what it does to the next tokens, and what it costs, in any units."""

    harm: float
    cost: float


@dataclass(frozen=True, slots=True)
class LayerOptions:
    """The options of one layer.

    Attributes:
        heads: for each head, one option for each candidate, in the order of the candidates.
        dense: the cost of the layer with all keys, with which it does no harm.
    """

    heads: tuple[tuple[Option, ...], ...]
    dense: float

    def price(self, chosen: "Chosen") -> Option:
        """The harm and the cost of a choice."""
        if chosen is None:
            return Option(0.0, self.dense)
        options = [head[at] for head, at in zip(self.heads, chosen, strict=True)]
        return Option(sum(option.harm for option in options), sum(option.cost for option in options))


Chosen = tuple[int, ...] | None
"""A layer's candidates, head by head; None for a dense layer."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What each layer gets, and the harm and the cost of all together."""

    layers: tuple[Chosen, ...]
    harm: float
    cost: float

    @classmethod
    def of(cls, layers: Sequence[LayerOptions], chosen: Sequence[Chosen]) -> "Choice":
        options = [layer.price(each) for layer, each in zip(layers, chosen, strict=True)]
        return cls(tuple(chosen), sum(option.harm for option in options), sum(option.cost for option in options))


class _Step(NamedTuple):
    """A change of one layer that lessens its harm."""

    layer: int
    chosen: Chosen
    gain: float
    cost: float


def choose(layers: Sequence[LayerOptions], budget: float) -> Choice | None:
    """The choice of least harm within the budget, as far as a price finds it; None if even the cheapest costs more."""
    best = at_price(layers, 0.0)
    if best.cost <= budget:
        return best
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        best = at_price(layers, high)
        if best.cost <= budget:
            break
        low, high = high, high * 4
    else:
        return None
    for _ in range(BISECTIONS):
        price = (low + high) / 2
        dearer = at_price(layers, price)
        if dearer.cost <= budget:
            best, high = dearer, price
        else:
            low = price
    return _spend(layers, best, budget)


def at_price(layers: Sequence[LayerOptions], price: float) -> Choice:
    """The choice that minimises harm + price * cost; of equal ones, the cheapest."""
    return Choice.of(layers, [_layer_at_price(layer, price) for layer in layers])


def _layer_at_price(layer: LayerOptions, price: float) -> Chosen:
    def rank(option: Option) -> tuple[float, float]:
        return option.harm + price * option.cost, option.cost

    best = tuple(min(range(len(head)), key=[rank(option) for option in head].__getitem__) for head in layer.heads)
    return min((best, None), key=lambda chosen: rank(layer.price(chosen)))


def _spend(layers: Sequence[LayerOptions], choice: Choice, budget: float) -> Choice:
    """Take the step that lessens harm most for its cost, again and again, while one fits the budget."""
    while True:
        steps = [step for step in _steps(layers, choice) if choice.cost + step.cost <= budget]
        if not steps:
            return choice
        free = [step for step in steps if step.cost <= 0]
        best = max(free, key=lambda step: step.gain) if free else max(steps, key=lambda step: step.gain / step.cost)
        chosen = list(choice.layers)
        chosen[best.layer] = best.chosen
        choice = Choice.of(layers, chosen)


def _steps(layers: Sequence[LayerOptions], choice: Choice) -> Iterator[_Step]:
    """Every other candidate for one head, or all keys for all heads of a layer, that lessens harm."""
    for number, (layer, chosen) in enumerate(zip(layers, choice.layers, strict=True)):
        if chosen is None:
            continue
        now = layer.price(chosen)
        if now.harm > 0:
            yield _Step(number, None, now.harm, layer.dense - now.cost)
        for head, options in enumerate(layer.heads):
            old = options[chosen[head]]
            for at, new in enumerate(options):
                if new.harm < old.harm:
                    changed = (*chosen[:head], at, *chosen[head + 1 :])
                    yield _Step(number, changed, old.harm - new.harm, new.cost - old.cost)
