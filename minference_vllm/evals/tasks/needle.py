# SPDX-License-Identifier: Apache-2.0
"""needle: one sentence hidden in the user's text, at all depths, and asked for at the end."""

from minference_vllm.evals.material import SLACK, Material, check_room
from minference_vllm.evals.sample import Kind, Sample

OPENING = "Below is a long text. A number is hidden in it. Remember it.\n\n"
NEEDLE = " The access code of the {place} is {code}."
SENTENCE_END = ". "
QUESTION = "\n\nWhat is the access code of the {place} that the text above mentions?"
ANSWER_START = " The access code of the {place} is"
PLACES = ("archive", "boathouse", "cellar", "granary", "lighthouse", "mill", "observatory", "workshop")
ANSWER_TOKENS = 24
DEPTHS = 10  # rows of the grid


def make(material: Material, tokens: int, samples: int) -> list[Sample]:
    """One sample for each depth, from the start of the text to its end, and then again from the start."""
    levels = min(samples, DEPTHS)
    return [_make(material, tokens, index, (index % levels + 0.5) / levels) for index in range(samples)]


def _make(material: Material, tokens: int, index: int, depth: float) -> Sample:
    lots, tokenizer = material.lots("needle", tokens, index), material.tokenizer
    place, code = lots.choice(PLACES), str(lots.randrange(10**6, 10**7))
    needle, question, start = (part.format(place=place, code=code) for part in (NEEDLE, QUESTION, ANSWER_START))
    room = tokens - ANSWER_TOKENS - SLACK - tokenizer.length(tokenizer.ask(OPENING + needle + question, start))
    check_room("needle", tokens, room)
    text = _hide(needle, tokenizer.decode(material.passage(room, lots)), depth)
    return Sample(
        task="needle",
        tokens=tokens,
        index=index,
        kind=Kind.ALL,
        max_tokens=ANSWER_TOKENS,
        references=(code,),
        depth=depth,
        **tokenizer.ask(OPENING + text + question, start),
    )


def _hide(needle: str, text: str, depth: float) -> str:
    """The text with the needle after the first sentence that ends at this depth or later."""
    place = round(depth * len(text))
    end = text.find(SENTENCE_END, place)
    place = place if end < 0 else end + 1
    return text[:place] + needle + text[place:]
