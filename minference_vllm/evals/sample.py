# SPDX-License-Identifier: Apache-2.0
"""A prompt with what is needed to score its answer, and what a server replied to it. Both are lines of JSON files."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from minference_vllm.evals.line import Line

POSITIONS = 16
"""Equal parts of a prompt whose log-probabilities are kept apart."""

Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
LogProb = Annotated[float, Field(ge=-1e6, le=1e-3)]
"""Rounding may put it a little above 0; vLLM sends -9999 for a token that is impossible."""


class Kind(StrEnum):
    """What is asked of a server, and how its reply is scored."""

    ALL = "all"
    """An answer in text: the share of the references that it holds."""
    ANY = "any"
    """An answer in text: whether it holds one of the references."""
    FIRST_CHOICE = "first_choice"
    """The prompt holds its answers: the share of their tokens that were the model's first choice."""
    LOGPROB = "logprob"
    """Only the prompt counts: the mean log-probability of its tokens."""
    AGREEMENT = "agreement"
    """An answer in text: the share of the dense server's tokens before the first that differs."""

    @property
    def reads_prompt(self) -> bool:
        """Whether the prompt is what is scored; whatever is generated after it then does not count."""
        return self in (Kind.FIRST_CHOICE, Kind.LOGPROB)


class Sample(Line):
    """One prompt."""

    task: str
    tokens: Count
    """The length that was asked for; prompt and answer fit in it."""
    index: Count
    """The sample's number among those of its task and length."""
    kind: Kind
    prompt: str | tuple[Count, ...]
    """A text, or token ids where the positions of tokens matter."""
    max_tokens: Count
    references: tuple[str, ...] = ()
    answers: tuple[Count, ...] = ()
    """Positions of the answers' tokens in a prompt that holds them."""
    depth: float | None = None
    """How far into the prompt what is asked for lies, from 0 to 1."""
    add_special_tokens: bool = True
    """False where a chat template has already put the special tokens into the text."""

    @property
    def flaw(self) -> str:
        """Why no reply to this sample could be scored; empty if replies can be."""
        if self.kind.reads_prompt and (isinstance(self.prompt, str) or len(self.prompt) < 2):
            return "prompt: one that is scored itself must be two or more token ids"
        if self.kind is Kind.LOGPROB and len(self.prompt) <= POSITIONS:
            return f"prompt: one whose {POSITIONS} parts are told apart must be more token ids than that"
        if self.kind in (Kind.ALL, Kind.ANY) and not self.references:
            return "references: an answer in text needs some"
        if self.kind is Kind.FIRST_CHOICE and not all(1 <= at < len(self.prompt) for at in self.answers or (0,)):
            return "answers: they must be positions in the prompt, after its first token"
        return ""

    @property
    def group(self) -> tuple[str, int]:
        """Task and length, within which scores are compared."""
        return self.task, self.tokens

    @property
    def id(self) -> str:
        return f"{self.task}/{self.tokens}/{self.index}"


class Step(Line):
    """One generated token, and the log-probabilities of the likeliest tokens in its place."""

    token: str
    likeliest: dict[str, LogProb]


class Reply(Line):
    """What a server replied."""

    id: str
    prompt_tokens: Count = 0
    text: str = ""
    error: str = ""
    """Why there is no answer; empty if there is one."""
    logprobs: tuple[LogProb, ...] = ()
    """Mean log-probability of a prompt's tokens in each of equal parts of it."""
    first_choices: tuple[bool, ...] = ()
    """For each token of the answers in a prompt, whether it is the likeliest."""
    steps: tuple[Step, ...] = ()
    """The generated tokens, where their probabilities were asked for."""

    def fits(self, sample: Sample) -> bool:
        """Whether the reply holds everything that is needed to score this sample."""
        match sample.kind:
            case Kind.FIRST_CHOICE:
                return len(self.first_choices) == len(sample.answers)
            case Kind.LOGPROB:
                return len(self.logprobs) == POSITIONS
        return True
