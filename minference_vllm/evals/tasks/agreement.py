# SPDX-License-Identifier: Apache-2.0
"""agreement: the user's own prompts. The dense server's answer counts as right."""

from minference_vllm.evals.material import Material
from minference_vllm.evals.sample import Kind, Sample

ANSWER_TOKENS = 64
SHORTEST = 1024


def make_all(material: Material) -> list[Sample]:
    """One sample for each prompt. Prompts are grouped by the power of two tokens in which prompt and answer fit."""
    samples: list[Sample] = []
    indices: dict[int, int] = {}
    for given in material.prompts:
        if "messages" in given:
            asked = material.tokenizer.converse(given["messages"])
        else:
            asked = material.tokenizer.ask(given["prompt"])
        needed = material.tokenizer.length(asked) + ANSWER_TOKENS
        tokens = max(SHORTEST, 1 << (needed - 1).bit_length())
        index = indices.get(tokens, 0)
        indices[tokens] = index + 1
        samples.append(
            Sample(
                task="agreement",
                tokens=tokens,
                index=index,
                kind=Kind.AGREEMENT,
                max_tokens=ANSWER_TOKENS,
                **asked,
            )
        )
    return sorted(samples, key=lambda sample: sample.tokens)
