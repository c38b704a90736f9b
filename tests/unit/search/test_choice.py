# SPDX-License-Identifier: Apache-2.0
"""Choosing: the budget is kept, what is known to be best is found, and chance never finds better."""

import itertools
import random
from collections.abc import Sequence

import pytest

from minference_vllm.search.choice import Choice, LayerOptions, Option, at_price, choose


def layer(*heads: Sequence[tuple[float, float]], dense: float = 1000.0) -> LayerOptions:
    return LayerOptions(tuple(tuple(Option(*option) for option in head) for head in heads), dense)


CURVE = [(8.0, 1.0), (4.0, 2.0), (2.0, 3.0), (1.0, 4.0)]
"""Each further unit of cost helps half as much as the one before."""

STEEP = [(10 * harm, cost) for harm, cost in CURVE]


def best(layers: Sequence[LayerOptions], budget: float) -> float:
    """The least harm of all choices there are."""
    choices = [[None, *itertools.product(*(range(len(head)) for head in each.heads))] for each in layers]
    found = [Choice.of(layers, chosen) for chosen in itertools.product(*choices)]
    return min(choice.harm for choice in found if choice.cost <= budget)


def test_cost_goes_to_the_heads_that_it_helps_most() -> None:
    layers = [layer(CURVE, STEEP)]
    # 80 and 8 at first; three steps of the steep head help by 40, 20 and 10, the first of the other by 4.
    for budget, expected in ((2, (0, 0)), (3, (0, 1)), (5, (0, 3)), (6, (1, 3)), (8, (3, 3))):
        choice = choose(layers, budget)
        assert choice is not None
        assert choice.layers == (expected,), budget


def test_a_layer_in_which_errors_do_most_is_dense() -> None:
    layers = [layer(STEEP, STEEP, dense=9.0), layer(CURVE, CURVE, dense=9.0)]
    choice = choose(layers, 11.0)
    assert choice is not None
    assert choice.layers == (None, (0, 0))
    assert (choice.harm, choice.cost) == (16.0, 11.0)


def test_with_budget_for_everything_nothing_is_harmed() -> None:
    layers = [layer(CURVE, dense=5.0), layer(CURVE, dense=6.0)]
    assert choose(layers, 11.0) == Choice((None, None), 0.0, 11.0)


def test_of_equal_harm_the_cheapest_is_taken() -> None:
    assert choose([layer([(1.0, 3.0), (1.0, 2.0), (1.0, 2.5)])], 100.0) == Choice(((1,),), 1.0, 2.0)
    assert choose([layer([(0.0, 3.0), (0.0, 2.0), (0.0, 2.5)])], 2000.0) == Choice(((1,),), 0.0, 2.0)


def test_what_cannot_be_paid_is_no_choice() -> None:
    assert choose([layer(CURVE, CURVE)], 1.9) is None
    assert choose([layer(CURVE, CURVE)], 2.0) == Choice(((0, 0),), 16.0, 2.0)


def test_what_a_price_leaves_of_the_budget_is_spent() -> None:
    # No price takes the middle candidate, which lies above the line between the others.
    layers = [layer([(10.0, 0.0), (6.0, 5.0), (0.0, 10.0)])]
    assert {at_price(layers, price).layers[0] for price in (0.5, 0.9, 1.1, 5.0)} == {(0,), (2,)}
    assert choose(layers, 7.0) == Choice(((1,),), 6.0, 5.0)


def draw(lots: random.Random, convex: bool) -> list[LayerOptions]:
    def head() -> list[tuple[float, float]]:
        cost, gains = 0.0, sorted((lots.randint(1, 50) for _ in range(3)), reverse=True)
        options = [(float(sum(gains)), cost := 1.0)]
        for gain in gains if convex else lots.sample(gains, 3):
            options.append((options[-1][0] - gain, cost := cost + 1))
        return options

    return [layer(head(), head(), dense=lots.randint(7, 12)) for _ in range(2)]


@pytest.mark.parametrize("seed", range(12))
def test_of_ever_smaller_gains_of_equal_cost_the_best_choice_is_found(seed: int) -> None:
    lots = random.Random(seed)
    layers = [LayerOptions(each.heads, 1000.0) for each in draw(lots, convex=True)]
    for budget in range(4, 17):
        choice = choose(layers, budget)
        assert choice is not None
        assert choice.harm == pytest.approx(best(layers, budget))


@pytest.mark.parametrize("seed", range(12))
def test_no_choice_costs_more_than_the_budget_or_harms_more_than_one_step_beside_the_best(seed: int) -> None:
    layers = draw(random.Random(seed), convex=False)
    largest = max(max(head[0].harm for head in each.heads) * len(each.heads) for each in layers)
    for budget in range(4, 25):
        choice = choose(layers, budget)
        assert choice is not None
        assert choice.cost <= budget
        assert choice == Choice.of(layers, choice.layers)
        assert best(layers, budget) <= choice.harm <= best(layers, budget) + largest
