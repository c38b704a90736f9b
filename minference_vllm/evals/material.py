# SPDX-License-Identifier: Apache-2.0
"""What prompts are made of: a tokenizer, the user's text, the user's prompts."""

import io
import json
import lzma
import random
from codecs import BOM_UTF8
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from minference_vllm.errors import ConfigError, shortened
from minference_vllm.evals.extras import need
from minference_vllm.files import parse_json, read_file

MAX_TEXT_BYTES = 2**28  # of the user's text, unpacked, and of their prompts
WANTED = '"prompt", a text, or "messages", a list of objects with a "role"'
SLACK = 16  # tokens: a text that is cut and joined has a few tokens more than its parts


class Tokenizer:
    """The tokenizer of the model that is served.

    Args:
        name: directory, or name on the hub.
        chat: put questions into the model's chat template.

    Raises:
        ConfigError: there is no tokenizer of that name, or it has no chat template.
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
        """The tokens that the model expects before any text."""
        bos = self._tokenizer.bos_token_id
        return [bos] if bos is not None and self._tokenizer.encode("")[:1] == [bos] else []

    def ask(self, question: str, answer_start: str = "") -> dict[str, Any]:
        """The fields `prompt` and `add_special_tokens` of a Sample that asks a question.

        Args:
            question: the text.
            answer_start: the words with which the answer begins.
        """
        if not self.chat:
            return {"prompt": question + answer_start, "add_special_tokens": True}
        return self.converse([{"role": "user", "content": question}], answer_start.lstrip())

    def converse(self, messages: list[dict[str, Any]], answer_start: str = "") -> dict[str, Any]:
        """As `ask`, for a whole conversation, which always uses the chat template.

        Raises:
            ConfigError: the tokenizer has no template, or its template refuses the conversation.
        """
        if not self._tokenizer.chat_template:
            raise ConfigError("Prompts of messages need a tokenizer with a chat template: give texts instead.")
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program that comes with the model
            raise ConfigError(
                f"The tokenizer's chat template refuses a conversation: {shortened(error, str)}."
            ) from None
        return {"prompt": str(text) + answer_start, "add_special_tokens": False}

    def length(self, asked: dict[str, Any]) -> int:
        """The number of tokens in a result of `ask`, within SLACK of what the server will count."""
        return len(self.encode(asked["prompt"]))


@dataclass(frozen=True, slots=True)
class Material:
    """What tasks may use.

    Attributes:
        tokenizer: the model's.
        tokenizer_name: its directory or name, for other programs that load it.
        text: tokens of the user's text; empty if there is none.
        prompts: the user's own, each with "prompt" or "messages".
        seed: of all random choices.
    """

    tokenizer: Tokenizer
    tokenizer_name: str
    text: list[int] = field(default_factory=list)
    prompts: tuple[dict[str, Any], ...] = ()
    seed: int = 0

    def lots(self, task: str, tokens: int, index: int) -> random.Random:
        """The random numbers for one sample. They do not depend on which other samples are made."""
        return random.Random(f"{self.seed}/{task}/{tokens}/{index}")

    def passage(self, tokens: int, lots: random.Random) -> list[int]:
        """As many tokens as asked for, from a random place of the text.

        Raises:
            ConfigError: the text is too short.
        """
        if len(self.text) < tokens:
            raise ConfigError(f"The text of --text has {len(self.text)} tokens, and {tokens} are needed: give more.")
        start = lots.randrange(len(self.text) - tokens + 1)
        return self.text[start : start + tokens]


def check_room(task: str, tokens: int, room: int, least: int = 1) -> None:
    """Refuse a length that leaves too little room beside the task's own words.

    Args:
        room: what the task's words leave of `tokens`, in any unit.
        least: the room that is needed.

    Raises:
        ConfigError: there is less room than that.
    """
    if room < least:
        raise ConfigError(f"The task {task} does not fit into {tokens} tokens: ask for more by --tokens.")


def load_text(path: Path, expected: str | None = None, option: str = "--text") -> str:
    """A text file, plain or compressed by xz.

    Args:
        expected: the fingerprint that the file must have.
        option: the option that named the file.

    Raises:
        ConfigError: it cannot be read, is too large, or has changed.
    """
    name = f"{option} {path}"
    raw = _read(path, name, expected)
    try:
        if path.suffix == ".xz":
            with lzma.open(io.BytesIO(raw)) as packed:
                raw = packed.read(MAX_TEXT_BYTES + 1)
        if len(raw) > MAX_TEXT_BYTES:
            raise ConfigError(f"{name} is unpacked larger than {MAX_TEXT_BYTES:,} bytes: give less.")
        return raw.decode()
    except (EOFError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise ConfigError(f"{name} cannot be read as UTF-8 text: {error}.") from None


def load_prompts(path: Path, expected: str | None = None) -> tuple[dict[str, Any], ...]:
    """A JSONL file, each line an object with "prompt" (a text) or "messages" (of a chat); `expected` as in load_text.

    Raises:
        ConfigError: it cannot be read, is too large, has changed, or has another line.
    """
    lines = _read(path, f"--prompts {path}", expected).removeprefix(BOM_UTF8).split(b"\n")
    return tuple(_prompt(path, number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _prompt(path: Path, number: int, line: bytes) -> dict[str, Any]:
    where = f"{path}, line {number}"
    given = parse_json(line, where)
    if not _is_prompt(given):
        raise ConfigError(f"{where} must be a JSON object with either {WANTED}.")
    try:
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where} has half a surrogate pair, which is no letter.") from None
    return given


def _is_prompt(given: Any) -> bool:
    if not isinstance(given, dict) or ("prompt" in given) == ("messages" in given):
        return False
    if "prompt" in given:
        return isinstance(given["prompt"], str)
    messages = given["messages"]
    return isinstance(messages, list) and bool(messages) and all(map(_is_message, messages))


def _is_message(given: Any) -> bool:
    return isinstance(given, dict) and isinstance(given.get("role"), str)


def _read(path: Path, name: str, expected: str | None) -> bytes:
    raw = read_file(path, name, MAX_TEXT_BYTES)
    if expected is not None and fingerprint_of(raw) != expected:
        raise ConfigError(f"{name} has changed while it was read: give the same command once more.")
    return raw


def fingerprint(path: Path) -> str:
    """A short text by which a file is told from others."""
    return fingerprint_of(read_file(path, str(path), MAX_TEXT_BYTES))


def fingerprint_of(raw: bytes) -> str:
    """The same of a file's content."""
    return sha256(raw).hexdigest()[:16]
