# SPDX-License-Identifier: Apache-2.0
"""What each client asks and when. Both are drawn from a seed, so that a dense and a sparse server get the same."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Fate(StrEnum):
    """How a request should end."""

    ANSWERED = "answered"
    CANCELLED = "cancelled"
    """The client hangs up in the middle of the answer."""
    DROPPED = "dropped"
    """The client hangs up before the first token."""
    INVALID = "invalid"
    """The server should refuse it."""


@dataclass(frozen=True, slots=True)
class Mix:
    """What requests are drawn from.

    Attributes:
        rate: requests a second, of all clients together.
        short_tokens, long_tokens: fewest and most tokens of a prompt; long ones are above the gate.
        answer_tokens: fewest and most.
        long_share: share of long prompts among all requests.
        cancelled, dropped, invalid: shares of all requests.
    """

    rate: float
    short_tokens: tuple[int, int]
    long_tokens: tuple[int, int]
    answer_tokens: tuple[int, int]
    long_share: float = 0.2
    cancelled: float = 0.05
    dropped: float = 0.05
    invalid: float = 0.02


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a client.

    Attributes:
        at_s: seconds after the traffic began; the request is sent later if the client's last one is not over by then.
        is_long: whether its prompt is above the gate.
        prompt_tokens, answer_tokens: how many.
        place: where in the source of tokens the prompt begins, from 0 to 1.
        fate: how it should end.
        moment: when it should end so, from 0 to 1 of the time that it may take.
    """

    at_s: float
    is_long: bool
    prompt_tokens: int
    answer_tokens: int
    place: float
    fate: Fate
    moment: float


def requests(mix: Mix, seed: int, client: int, clients: int) -> Iterator[Request]:
    """A client's requests, without end. Pauses are exponentially distributed, so clients do not fall into step."""
    rng = random.Random(f"{seed}/{client}")
    at_s = 0.0
    while True:
        at_s += rng.expovariate(mix.rate / clients)
        is_long = rng.random() < mix.long_share
        yield Request(
            at_s=at_s,
            is_long=is_long,
            prompt_tokens=rng.randint(*(mix.long_tokens if is_long else mix.short_tokens)),
            answer_tokens=rng.randint(*mix.answer_tokens),
            place=rng.random(),
            fate=_fate(mix, rng.random()),
            moment=rng.random(),
        )


def _fate(mix: Mix, drawn: float) -> Fate:
    for share, fate in ((mix.cancelled, Fate.CANCELLED), (mix.dropped, Fate.DROPPED), (mix.invalid, Fate.INVALID)):
        if drawn < share:
            return fate
        drawn -= share
    return Fate.ANSWERED
