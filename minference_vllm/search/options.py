# SPDX-License-Identifier: Apache-2.0
"""Turns measurements into options: each head's part of a candidate's cost in its layer, and the harm it does."""

import statistics
from collections.abc import Mapping, Sequence

from minference_vllm.search.choice import LayerOptions, Option
from minference_vllm.search.meter import LayerTrials, Trial

Measured = Sequence[Mapping[int, LayerTrials]]
"""The results for each prompt, by the layer's position."""

LEAST = 1e-30  # in place of zero, to divide by


def weights(measured: Measured, kls: Sequence[Mapping[int, float]], rough: int) -> dict[int, float]:
    """How much a layer's relative output error changes the next tokens: nats for each unit of squared error.

    Args:
        kls: KL divergence of each prompt with the rough candidate in one layer alone, by the layer's position.
        rough: the rough candidate's number.
    """
    return {
        position: _mean([of[position] for of in kls]) / max(sum(_errors(measured, position, rough)), LEAST)
        for position in measured[0]
    }


def layer_options(measured: Measured, weight: Mapping[int, float], candidates: range) -> list[LayerOptions]:
    """What each layer may get, in the order of their positions.

    Args:
        weight: see `weights`.
        candidates: the numbers of one method's candidates.
    """
    layers = []
    for position in measured[0]:
        costs = [_costs(measured, position, candidate, candidates) for candidate in candidates]
        errors = [_errors(measured, position, candidate) for candidate in candidates]
        heads = tuple(
            tuple(Option(weight[position] * error[head], cost[head]) for error, cost in zip(errors, costs, strict=True))
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
