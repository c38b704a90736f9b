# SPDX-License-Identifier: Apache-2.0
"""A prompt with what is needed to score its answer, and what a server replied to it. Both are lines of JSON files."""

from enum import StrEnum

from minference_vllm.evals.line import Line


class Kind(StrEnum):
    """What is asked of a server, and how its reply is scored."""

    ALL = "all"
    """An answer in text: the share of the references that it holds."""
    ANY = "any"
    """An answer in text: whether it holds one of the references."""
    FIRST_CHOICE = "first_choice"
    """The prompt holds its answers: the share of their tokens that the model itself would have said."""
    LOGPROB = "logprob"
    """The prompt alone: the mean log-probability of its tokens."""
    AGREEMENT = "agreement"
    """An answer in text: the share of the dense server's tokens before the first that differs."""

    @property
    def reads_prompt(self) -> bool:
        """Scored is the prompt; what is generated after it does not count."""
        return self in (Kind.FIRST_CHOICE, Kind.LOGPROB)


class Sample(Line):
    """One prompt."""

    task: str
    tokens: int
    """The length that was asked for; prompt and answer fit in it."""
    index: int
    """Among those of its task and length."""
    kind: Kind
    prompt: str | tuple[int, ...]
    """A text, or token ids where it matters which token stands where."""
    max_tokens: int
    references: tuple[str, ...] = ()
    answers: tuple[int, ...] = ()
    """Positions of the answers' tokens in a prompt that holds them."""
    depth: float | None = None
    """How far into the prompt what is asked for lies, from 0 to 1."""
    add_special_tokens: bool = True
    """False where a chat template has put them into the text."""

    @property
    def group(self) -> tuple[str, int]:
        """Scores are compared within a task and length."""
        return self.task, self.tokens

    @property
    def id(self) -> str:
        return f"{self.task}/{self.tokens}/{self.index}"


class Step(Line):
    """One generated token, and the log-probabilities of the likeliest tokens in its place."""

    token: str
    likeliest: dict[str, float]


class Reply(Line):
    """What a server replied."""

    id: str
    prompt_tokens: int = 0
    text: str = ""
    error: str = ""
    """Why there is no answer; empty if there is one."""
    logprobs: tuple[float, ...] = ()
    """Mean log-probability of a prompt's tokens in each of equal parts of it."""
    first_choices: tuple[bool, ...] = ()
    """For each token of the answers in a prompt, whether it is the likeliest."""
    steps: tuple[Step, ...] = ()
    """The generated tokens, where their probabilities were asked for."""
