# SPDX-License-Identifier: Apache-2.0
"""What prompts are made of: a tokenizer, the user's text, the user's prompts."""

import json
import lzma
import random
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from minference_vllm.errors import ConfigError
from minference_vllm.evals.extras import need

SLACK = 16  # tokens: a text that is cut and joined has a few tokens more than its parts


class Tokenizer:
    """The tokenizer of the model that is served.

    Args:
        name: directory, or name on the hub.
        chat: put questions into the model's chat template.

    Raises:
        ConfigError: there is none of that name, or it has no chat template.
    """

    def __init__(self, name: str, chat: bool = False) -> None:
        transformers = need("transformers")
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise ConfigError(f"The tokenizer of {name!r} cannot be read: {error} Name one: --tokenizer.") from None
        self.chat = chat
        if chat and not self._tokenizer.chat_template:
            raise ConfigError(f"The tokenizer of {name!r} has no chat template: leave out --chat.")

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens))

    @property
    def start(self) -> list[int]:
        """What the model expects before any text."""
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and self._tokenizer.encode("")[:1] == [bos] else []

    def ask(self, question: str, answer_start: str = "") -> dict[str, Any]:
        """`prompt` and `add_special_tokens` of a Sample.

        Args:
            question: the text.
            answer_start: the words with which the answer begins.
        """
        if not self.chat:
            return {"prompt": question + answer_start, "add_special_tokens": True}
        return self.converse([{"role": "user", "content": question}], answer_start.lstrip())

    def converse(self, messages: list[dict[str, Any]], answer_start: str = "") -> dict[str, Any]:
        """As `ask`, of a conversation, always in the chat template."""
        if not self._tokenizer.chat_template:
            raise ConfigError("Prompts of messages need a tokenizer with a chat template: give texts instead.")
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return {"prompt": str(text) + answer_start, "add_special_tokens": False}

    def length(self, asked: dict[str, Any]) -> int:
        """Tokens of what `ask` gave, as the server will count them, within SLACK."""
        return len(self.encode(asked["prompt"]))


@dataclass(frozen=True, slots=True)
class Material:
    """What tasks may use.

    Attributes:
        tokenizer: the model's.
        tokenizer_name: where it came from, for programs of others.
        text: tokens of the user's text, none without.
        prompts: the user's own, each with "prompt" or "messages".
        seed: of all that is drawn.
    """

    tokenizer: Tokenizer
    tokenizer_name: str
    text: list[int] = field(default_factory=list)
    prompts: tuple[dict[str, Any], ...] = ()
    seed: int = 0

    def lots(self, task: str, tokens: int, index: int) -> random.Random:
        """What a sample draws from: the same whatever other samples are made."""
        return random.Random(f"{self.seed}/{task}/{tokens}/{index}")

    def passage(self, tokens: int, lots: random.Random) -> list[int]:
        """So many tokens from a random place of the text.

        Raises:
            ConfigError: the text is too short.
        """
        if len(self.text) < tokens:
            raise ConfigError(f"The text of --text has {len(self.text)} tokens, and {tokens} are needed: give more.")
        start = lots.randrange(len(self.text) - tokens + 1)
        return self.text[start : start + tokens]


def check_room(task: str, tokens: int, room: int, least: int = 1) -> None:
    """Refuse a length that a task's own words fill.

    Args:
        room: what the task's words leave of so many tokens, in any unit.
        least: the room that it needs.

    Raises:
        ConfigError: there is less.
    """
    if room < least:
        raise ConfigError(f"The task {task} does not fit into {tokens} tokens: ask for more by --tokens.")


def load_text(path: Path) -> str:
    """A text file, plain or compressed by xz."""
    try:
        raw = path.read_bytes()
        return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise ConfigError(f"--text {path} cannot be read as UTF-8 text: {error}.") from None


def load_prompts(path: Path) -> tuple[dict[str, Any], ...]:
    """A JSONL file, each line an object with "prompt" (a text) or "messages" (of a chat)."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path} cannot be read: {error}.") from None
    return tuple(_prompt(path, number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _prompt(path: Path, number: int, line: str) -> dict[str, Any]:
    wanted = 'a JSON object with "prompt", a text, or "messages", a list'
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {number} is no JSON ({error}); each line is {wanted}.") from None
    if not isinstance(given, dict) or not (
        isinstance(given.get("prompt"), str) or isinstance(given.get("messages"), list)
    ):
        raise ConfigError(f"{path}, line {number}: each line is {wanted}.")
    return given


def fingerprint(path: Path) -> str:
    """Tells a file from others in a few letters."""
    try:
        return sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
