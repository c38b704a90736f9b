# SPDX-License-Identifier: Apache-2.0
"""What must hold for any input: it is taken, or refused with one sentence; quickly, in little memory, and privately."""

import logging
import os
import resource
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from minference_vllm.errors import LONGEST_MESSAGE, ConfigError
from minference_vllm.evals.errors import ServerError

MOST_SECONDS = 5.0  # of computing
MOST_WAIT = 30.0  # seconds in all, because other jobs may keep the machine busy
MOST_BYTES = 2**30  # beyond what the process holds already
CANARY = "canary-7f3a"
"""Marks what must not appear in any output: keys, prompts, and other files with their names."""

CODE = tuple(os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
ZIPS = tuple(os.path.realpath(path) for path in sys.path if path.endswith(".zip"))  # where imports look too
PACKAGE = str(Path(__file__).parents[2] / "minference_vllm")


class Fault(Exception):
    """Something that must not happen has happened."""


class Overdue(BaseException):
    """The time is up. It is no Exception, because the code that is tried may catch those."""


_opened: list[Any] | None = None
_watched: int | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and threading.get_ident() == _watched:
        _opened.append(arguments[0])


sys.addaudithook(_note)  # Python offers no way to remove it


def examine(act: Callable[[], object], named: Collection[Path]) -> bool:
    """Whether an input is accepted.

    Args:
        act: reads the input.
        named: files and folders that the user named; no other may be opened, or named in a log.

    Raises:
        Fault: it is neither accepted nor refused as it should be.
    """
    accepted = True
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with _lines_logged() as lines, _files_opened() as opened:
        try:
            with _bounded(held + MOST_BYTES):
                act()
        except (ConfigError, ServerError) as error:
            accepted = False
            _check_sentence(str(error))
        except (Exception, Overdue) as error:
            raise Fault(f"{type(error).__name__} at {_place(error)}: {str(error)[:200]}") from error
    allowed = [*map(_real, named), *CODE, *ZIPS, PACKAGE]
    for path in opened:
        if not isinstance(path, int) and not _is_within(_real(path), allowed):
            raise Fault(f"opened {path!r}, which nobody named")
    for line in lines:
        if CANARY in line:
            raise Fault(f"logged {line!r}")
    return accepted


def _check_sentence(message: str) -> None:
    if len(message) > LONGEST_MESSAGE:
        raise Fault(f"a message of {len(message)} characters: {message[:200]}")
    if not message.isprintable():
        raise Fault(f"a message that is no line: {message[:200]!r}")
    if not message.strip():
        raise Fault("an empty message")


def _place(error: BaseException) -> str:
    """Where an exception was raised: the innermost line of the package."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(PACKAGE)]
    return f"{Path(ours[-1].filename).relative_to(PACKAGE)}:{ours[-1].lineno}" if ours else "none of our lines"


def _real(path: Any) -> str:
    """Where a path leads; itself, if it cannot be one."""
    try:
        return os.path.realpath(os.fsdecode(path))
    except ValueError:
        return os.fspath(path)


def _is_within(path: str, folders: Collection[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


@contextmanager
def _files_opened() -> Iterator[list[Any]]:
    """Inside a `with` block, what this thread opens."""
    global _opened, _watched
    opened: list[Any] = []
    _opened, _watched = opened, threading.get_ident()
    try:
        yield opened
    finally:
        _opened = None


@contextmanager
def _lines_logged() -> Iterator[list[str]]:
    """Inside a `with` block, what the package logs."""
    lines: list[str] = []
    logger, handler = logging.getLogger("vllm"), logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


@contextmanager
def _bounded(most_bytes: int) -> Iterator[None]:
    """Stops what takes too long, and limits the process's memory."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Overdue(f"not done after {MOST_SECONDS} s of computing, or {MOST_WAIT} s in all")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limits = {signal.ITIMER_REAL: (signal.SIGALRM, MOST_WAIT), signal.ITIMER_PROF: (signal.SIGPROF, MOST_SECONDS)}
    before = [
        (timer, number, signal.getitimer(timer), signal.getsignal(number)) for timer, (number, _) in limits.items()
    ]
    for timer, (number, seconds) in limits.items():
        signal.signal(number, stop)
        signal.setitimer(timer, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, hard))
    try:
        yield
    finally:
        for timer, number, running, handler in before:
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
            signal.setitimer(timer, *running)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
