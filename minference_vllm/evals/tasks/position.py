# SPDX-License-Identifier: Apache-2.0
"""position: how well the model predicts the user's text, depending on the position in the prompt."""

from minference_vllm.evals.material import SLACK, Material, check_room
from minference_vllm.evals.sample import POSITIONS, Kind, Sample


def make(material: Material, tokens: int, samples: int) -> list[Sample]:
    """Passages of the text from random places."""
    start = material.tokenizer.start
    room = tokens - SLACK - len(start)
    check_room("position", tokens, room, least=POSITIONS + 1)  # the first token has no log-probability
    return [
        Sample(
            task="position",
            tokens=tokens,
            index=index,
            kind=Kind.LOGPROB,
            max_tokens=1,
            prompt=(*start, *material.passage(room, material.lots("position", tokens, index))),
        )
        for index in range(samples)
    ]
