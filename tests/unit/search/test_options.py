# SPDX-License-Identifier: Apache-2.0
"""What a head's candidate costs and harms: parts of what was measured of the whole layer, and together all of it."""

import pytest

from minference_vllm.search.meter import LayerTrials, Trial
from minference_vllm.search.options import layer_options, total_cost, weights

# Two candidates of one method and one of another, of two heads, in one layer of two prompts.
MEASURED = [
    {
        5: LayerTrials(
            dense=10.0,
            norm=100.0,
            trials=(
                Trial(1.0, 2.0, (100.0, 300.0), (4.0, 1.0)),
                Trial(3.0, 4.0, (500.0, 500.0), (2.0, 0.0)),
                Trial(0.5, 1.0, (1.0, 1.0), (50.0, 50.0)),
            ),
        )
    },
    {
        5: LayerTrials(
            dense=20.0,
            norm=1000.0,
            trials=(
                Trial(2.0, 4.0, (100.0, 300.0), (20.0, 30.0)),
                Trial(2.0, 8.0, (400.0, 400.0), (10.0, 10.0)),
                Trial(0.5, 1.0, (1.0, 1.0), (500.0, 500.0)),
            ),
        )
    },
]
KLS = [{5: 0.3}, {5: 0.5}]


def test_a_layers_weight_is_what_its_error_does_to_the_next_tokens() -> None:
    # Relative errors of the first candidate are .05 and .05.
    assert weights(MEASURED, KLS, 0) == {5: pytest.approx(0.4 / 0.05)}
    assert weights(MEASURED, KLS, 2) == {5: pytest.approx(0.4 / 1.0)}


def test_heads_share_choosing_evenly_and_attending_by_pairs() -> None:
    [layer] = layer_options(MEASURED, {5: 2.0}, range(2))
    assert layer.dense == 15.0
    # Choosing takes 2 ms in both prompts, whatever is kept: 1 ms a head.
    costs = [[option.cost for option in head] for head in layer.heads]
    assert costs[0] == [pytest.approx(1 + (0.5 + 1) / 2), pytest.approx(1 + (2 + 4) / 2)]
    assert costs[1] == [pytest.approx(1 + (1.5 + 3) / 2), pytest.approx(1 + (2 + 4) / 2)]
    harms = [[option.harm for option in head] for head in layer.heads]
    assert harms[0] == [pytest.approx(2 * (0.04 + 0.02) / 2), pytest.approx(2 * (0.02 + 0.01) / 2)]
    assert harms[1] == [pytest.approx(2 * (0.01 + 0.03) / 2), pytest.approx(2 * (0.0 + 0.01) / 2)]


def test_all_heads_together_cost_what_the_layer_costs() -> None:
    [layer] = layer_options(MEASURED, {5: 1.0}, range(2, 3))
    assert layer.price((0, 0)).cost == pytest.approx(1.5)
    assert total_cost(MEASURED[0], 2) == pytest.approx(1.5)


def test_a_layer_that_a_contender_keeps_dense_costs_what_dense_attention_costs() -> None:
    layers = {0: LayerTrials(7.0, 1.0, (Trial(1.0, 2.0, (1.0,), (0.0,)),)), 1: LayerTrials(9.0, 1.0, (None,))}
    assert total_cost(layers, 0) == 12.0
