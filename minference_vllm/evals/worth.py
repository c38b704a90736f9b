# SPDX-License-Identifier: Apache-2.0
"""Leaves out tasks and lengths that the model cannot do with dense attention: nothing can be lost there."""

import statistics
from collections.abc import Mapping, Sequence

from minference_vllm.errors import ConfigError
from minference_vllm.evals.prepare import Prepared
from minference_vllm.evals.sample import Kind, Reply, Sample
from minference_vllm.evals.scores import score_alone

RIGHT_OR_WRONG = (Kind.ALL, Kind.ANY, Kind.FIRST_CHOICE)
"""Kinds whose score is a share of what is right. The others' scores say nothing about what a model can do."""


def worth_comparing(prepared: Prepared, dense: Mapping[str, Reply], above: int) -> Prepared:
    """The samples of the tasks and lengths on which the dense server scores above a percentage; the others are noted.

    Args:
        dense: the dense server's replies, by the sample's id; to each sample there is one.
        above: percentage, from 0 on.

    Raises:
        ConfigError: the dense server scores no more than that on any of them.
    """
    groups: dict[tuple[str, int], list[Sample]] = {}
    for sample in prepared.samples:
        groups.setdefault(sample.group, []).append(sample)
    kept, left_out = [], {}
    for (task, tokens), samples in groups.items():
        percentage = _percentage(samples, dense)
        if percentage is None or percentage > above:
            kept += samples
        else:
            left_out[f"{task} at {tokens} tokens"] = f"dense attention scores {percentage:.1f}%, no more than {above}%"
    if not kept:
        raise ConfigError(f"Dense attention scores no more than {above}% on any task: nothing is left to compare.")
    header = prepared.header.model_copy(update={"left_out": {**prepared.header.left_out, **left_out}})
    return Prepared(header, kept, prepared.sha256)


def _percentage(samples: Sequence[Sample], dense: Mapping[str, Reply]) -> float | None:
    """What the dense server scores on samples of one task and length; None if that says nothing."""
    if samples[0].kind not in RIGHT_OR_WRONG:
        return None
    replies = [(sample, dense[sample.id]) for sample in samples]
    scores = [score_alone(sample, reply) for sample, reply in replies if not reply.error]
    return 100 * statistics.fmean(scores) if scores else None
