# SPDX-License-Identifier: Apache-2.0
"""Files that a user names."""

import contextlib
import json
import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minference_vllm.errors import ConfigError, shortened

MAX_FILE_BYTES = 2**20
MAX_LINE_BYTES = 2**27
MAX_LINES_BYTES = 2**34  # of all lines of a file together


def read_file(path: Path, name: str, most: int = MAX_FILE_BYTES) -> bytes:
    """The content of a file; messages call the file `name`.

    Raises:
        ConfigError: it cannot be read, or is larger than `most` bytes.
    """
    try:
        with _open(path, name) as file:
            is_larger = os.fstat(file.fileno()).st_size > most
            content = b"" if is_larger else file.read(most + 1)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}.") from None
    if is_larger or len(content) > most:  # it may have grown
        raise ConfigError(f"{name} is larger than {most:,} bytes: name another file.")
    return content


def read_lines(path: Path, name: str) -> Iterator[bytes]:
    """The lines of a file, one at a time, each with the newline that ends it: the last may have none.

    Raises:
        ConfigError: the file cannot be read, or it or a line is too large.
    """
    left = MAX_LINES_BYTES
    try:
        with _open(path, name) as file:
            while line := file.readline(min(MAX_LINE_BYTES, left) + 1):
                left -= len(line)
                if len(line) > MAX_LINE_BYTES:
                    raise ConfigError(f"{name} has a line of more than {MAX_LINE_BYTES:,} bytes: name another file.")
                if left < 0:
                    raise ConfigError(f"{name} is larger than {MAX_LINES_BYTES:,} bytes: name another file.")
                yield line
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}.") from None


def parse_json(content: bytes | str, name: str) -> Any:
    """A JSON document in UTF-8, with or without a byte order mark.

    Raises:
        ConfigError: it is not valid JSON, or an object has a key twice: JSON readers disagree about which one counts.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply.") from None
    except ValueError as error:
        raise ConfigError(f"{name} is not valid JSON: {error}.") from None


def write_file(path: Path, text: str, name: str) -> None:
    """Write a file, and create its folders. An existing file is replaced atomically: no reader sees half of it.

    Raises:
        ConfigError: it cannot be written.
    """
    draft = None
    try:
        whole = Path(os.path.realpath(path))
        draft = whole.with_name(f"{whole.name}.tmp")
        whole.parent.mkdir(parents=True, exist_ok=True)
        if whole.exists() and not whole.is_file():  # a pipe or a terminal
            whole.write_text(text, encoding="utf-8")
            return
        draft.write_text(text, encoding="utf-8")
        if whole.exists():
            shutil.copymode(whole, draft)
        os.replace(draft, whole)
    except (OSError, ValueError) as error:
        if draft is not None:
            with contextlib.suppress(OSError, ValueError):
                draft.unlink(missing_ok=True)
        raise ConfigError(f"{name} cannot be written: {reason(error)}.") from None


def refuse_unwritable(path: Path, name: str) -> None:
    """Check that a file can be written, before time is spent on its content.

    Raises:
        ConfigError: it cannot.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name} cannot be written: {reason(error)}.") from None
    folder = path.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK) or not folder.is_dir():
        raise ConfigError(f"{name} cannot be written: {folder} is no folder that can be written.")


def reason(error: Exception) -> str:
    """Why a file cannot be used, without the file's name: the sentence around it gives that."""
    return getattr(error, "strerror", None) or str(error)


def _open(path: Path, name: str) -> BinaryIO:
    """Open a regular file, and refuse others.

    A pipe may block until something is written to it, a device may never end, and several workers cannot all read the
    same content from either.
    """
    try:
        file = open(path, "rb", opener=lambda each, flags: os.open(each, flags | os.O_NONBLOCK))  # noqa: SIM115
    except ValueError as error:  # the path holds a zero byte, or something that cannot be encoded
        raise ConfigError(f"{name} cannot be read: {error}.") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ConfigError(f"{name} cannot be read: it is a pipe or a device. Name a regular file.")
    return file


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shortened(twice)} stands there twice")
    return found


def _refuse_constant(word: str) -> Any:
    raise ValueError(f"{word} is no number")
