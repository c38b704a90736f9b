# SPDX-License-Identifier: Apache-2.0
"""Turns measurements into options: each head's part of a candidate's cost in its layer, and the harm it does."""

import statistics
from collections.abc import Mapping, Sequence

from minference_vllm.search.choice import LayerOptions, Option
from minference_vllm.search.contender import Place
from minference_vllm.search.meter import LayerTrials, Trial

Measured = Sequence[Mapping[int, LayerTrials]]
"""The results for each prompt, by the layer's position."""

KLs = Mapping[Place, float]
"""What a candidate in one place alone does to a prompt's next tokens: KL divergence in nats, by the place."""

LEAST = 1e-30  # in place of zero, to divide by
LEAST_PART = 1e-3
"""The least error that a head's weight is divided by, as a part of the errors of its layer."""


def weights(measured: Measured, kls: Sequence[KLs], rough: int) -> dict[int, tuple[float, ...]]:
    """How much each head's error changes the next tokens, by the layer's position.

    In nats for each unit of squared error, relative to the output of the whole layer. If a layer's heads were not
    measured one by one, all of them have the layer's weight. Otherwise they divide the layer's effect as they do among
    themselves: together they need not have the effect of the layer.

    Args:
        kls: for each prompt, the effects of the rough candidate in one place alone; heads may be missing.
        rough: the rough candidate's number.
    """
    return {position: _layer_weights(_errors(measured, position, rough), position, kls) for position in measured[0]}


def _layer_weights(errors: Sequence[float], position: int, kls: Sequence[KLs]) -> tuple[float, ...]:
    """The weights of a layer's heads, from their errors with the rough candidate."""
    total = max(sum(errors), LEAST)
    layer = _mean([of[Place(position)] for of in kls])
    found = [[of[place] for of in kls if (place := Place(position, head)) in of] for head in range(len(errors))]
    heads = [_mean(of_head) for of_head in found if of_head]
    if len(heads) < len(errors) or sum(heads) <= 0:
        return (layer / total,) * len(errors)
    # A head that the rough candidate costs next to nothing says nothing of what larger errors do.
    least = total * LEAST_PART
    return tuple(layer * kl / sum(heads) / max(error, least) for kl, error in zip(heads, errors, strict=True))


def heaviest(kls: Sequence[KLs], count: int) -> list[int]:
    """The positions of the layers with the largest effects on the next tokens, in their order."""
    positions = [place.position for place in kls[0] if place.head is None]
    by_effect = sorted(positions, key=lambda position: _mean([of[Place(position)] for of in kls]), reverse=True)
    return sorted(by_effect[:count])


def layer_options(measured: Measured, weight: Mapping[int, Sequence[float]], candidates: range) -> list[LayerOptions]:
    """What each layer may get, in the order of their positions.

    Args:
        weight: of each head, see `weights`.
        candidates: the numbers of one method's candidates.
    """
    layers = []
    for position in measured[0]:
        costs = [_costs(measured, position, candidate, candidates) for candidate in candidates]
        errors = [_errors(measured, position, candidate) for candidate in candidates]
        heads = tuple(
            tuple(
                Option(weight[position][head] * error[head], cost[head])
                for error, cost in zip(errors, costs, strict=True)
            )
            for head in range(len(errors[0]))
        )
        layers.append(LayerOptions(heads, _mean([prompt[position].dense for prompt in measured])))
    return layers


def total_cost(layers: Mapping[int, LayerTrials], contender: int) -> float:
    """A contender's cost in all layers, including those that it keeps dense."""
    trials = ((layer, layer.trials[contender]) for layer in layers.values())
    return sum(layer.dense if trial is None else trial.choosing + trial.attending for layer, trial in trials)


def _costs(measured: Measured, position: int, candidate: int, alike: range) -> list[float]:
    """Each head's part of the cost. Choosing costs all heads and candidates the same; attending is divided by pairs."""
    shares = []
    for prompt in measured:
        trial = _trial(prompt, position, candidate)
        choosing = _mean([_trial(prompt, position, other).choosing for other in alike]) / len(trial.pairs)
        shares.append([choosing + trial.attending * pairs / sum(trial.pairs) for pairs in trial.pairs])
    return [_mean(head) for head in zip(*shares, strict=True)]


def _errors(measured: Measured, position: int, candidate: int) -> list[float]:
    """Each head's squared error, relative to the output of the whole layer."""
    shares = []
    for prompt in measured:
        norm, trial = prompt[position].norm, _trial(prompt, position, candidate)
        shares.append([error / max(norm, LEAST) for error in trial.errors])
    return [_mean(head) for head in zip(*shares, strict=True)]


def _trial(prompt: Mapping[int, LayerTrials], position: int, candidate: int) -> Trial:
    trial = prompt[position].trials[candidate]
    assert trial is not None, "a candidate runs in every layer"
    return trial


def _mean(numbers: Sequence[float]) -> float:
    return statistics.fmean(numbers)
