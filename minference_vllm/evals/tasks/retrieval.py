# SPDX-License-Identifier: Apache-2.0
"""retrieval: a JSON dictionary of random keys and values, as long as the prompt may be, and one key to look up.

All pairs look alike, so the one to look up does not stand out. The task is that of "Lost in the Middle" (arXiv
2307.03172).
"""

import json
import random
import uuid

from minference_vllm.evals.material import SLACK, Material, Tokenizer, check_room
from minference_vllm.evals.sample import Kind, Sample

OPENING = "Look up the value of a key in this JSON object.\n\n"
QUESTION = '\n\nWhat is the value of the key "{key}"?'
ANSWER_START = ' The value of the key "{key}" is "'
ANSWER_TOKENS = 64
MEASURED_PAIRS = 32


def make(material: Material, tokens: int, samples: int) -> list[Sample]:
    """In each sample, the pair that is asked for lies at another depth."""
    return [_make(material, tokens, index, (index + 0.5) / samples) for index in range(samples)]


def _make(material: Material, tokens: int, index: int, depth: float) -> Sample:
    lots, tokenizer = material.lots("retrieval", tokens, index), material.tokenizer
    pairs = _pairs(tokenizer, tokens, lots)
    while True:
        check_room("retrieval", tokens, len(pairs))
        key, value = pairs[int(depth * len(pairs))]
        question, start = (part.format(key=key) for part in (QUESTION, ANSWER_START))
        asked = tokenizer.ask(OPENING + json.dumps(dict(pairs), indent=0) + question, start)
        surplus = tokenizer.length(asked) + ANSWER_TOKENS + SLACK - tokens
        if surplus <= 0:
            break
        del pairs[-max(1, surplus * len(pairs) // tokens) :]
    return Sample(
        task="retrieval",
        tokens=tokens,
        index=index,
        kind=Kind.ALL,
        max_tokens=ANSWER_TOKENS,
        references=(value,),
        depth=depth,
        **asked,
    )


def _pairs(tokenizer: Tokenizer, tokens: int, lots: random.Random) -> list[tuple[str, str]]:
    """A few more pairs than fit into the prompt."""
    some = [(_uuid(lots), _uuid(lots)) for _ in range(MEASURED_PAIRS)]
    each = len(tokenizer.encode(json.dumps(dict(some), indent=0))) / MEASURED_PAIRS
    return [(_uuid(lots), _uuid(lots)) for _ in range(int(tokens / each) + 1)]


def _uuid(lots: random.Random) -> str:
    return str(uuid.UUID(int=lots.getrandbits(128), version=4))
