# SPDX-License-Identifier: Apache-2.0
"""Hostile values, JSON documents and bytes."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as some

from benchmarks.fuzz.watch import CANARY

NUMBERS = (
    0,
    1,
    -1,
    2**24,
    2**24 + 1,
    2**31,
    2**63,
    -(2**63),
    2**64,
    10**400,
    -(10**400),
    0.0,
    -0.0,
    0.5,
    1.0,
    1.5,
    5e-324,
    1e308,
    -1e308,
    math.inf,
    -math.inf,
    math.nan,
)
WORDS = (
    "",
    " ",
    "\0",
    "a\0b",
    "\n",
    "\x85",
    "\u2028",
    "\x1b[31m",
    "\ud800",
    "\udcff",
    "\ufeff",
    "\u0663",
    "\u00b2",
    "1",
    "1e3",
    "nan",
    "true",
    "None",
    "x" * 100_000,
    "\U0001f600" * 200,
    "../../etc/passwd",
    "/dev/zero",
    "{names}",
    "%s",
    "dense",
    "block",
    "vertical_slash",
    "auto",
    "name",
    "a_shape",
    "vertical_and_slash",
    "stream_llm",
    "block_sparse",
)
DEPTH = 3000  # of nesting: beyond Python's recursion limit

scalars = some.one_of(
    some.none(),
    some.booleans(),
    some.sampled_from(NUMBERS),
    some.sampled_from(WORDS),
    some.integers(),
    some.floats(),
    some.text(max_size=20),
    some.text(some.characters(categories=("Cs", "Cc", "Nd", "Zl")), max_size=5),
)


def _nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


plain = some.recursive(
    scalars,
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(some.sampled_from(WORDS), inner, max_size=4),
)
# Made by functions, because Hypothesis prints what it is given, and Python refuses to print such a number.
outsized = some.sampled_from(
    (
        lambda: 10**5000,
        lambda: _nested(50),
        lambda: _nested(DEPTH),
        lambda: [0] * 10_000,
        lambda: {"x" * 1000: 0},
    )
).map(lambda make: make())
values = some.one_of(scalars, plain, outsized)


@some.composite
def mutated(draw: Callable[..., Any], base: Any) -> Any:
    """A JSON value in which a few places were replaced, removed, added or repeated."""
    value = copy.deepcopy(base)  # it is changed in place
    for _ in range(draw(some.integers(0, 3))):
        value = _mutate(draw, value)
    return value


def _mutate(draw: Callable[..., Any], value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or draw(some.integers(0, 9)) == 0:
        return draw(values)
    place = draw(some.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    match draw(some.sampled_from(("inside", "inside", "inside", "replace", "remove", "add"))):
        case "inside":
            value[place] = _mutate(draw, value[place])
        case "replace":
            value[place] = draw(values)
        case "remove":
            del value[place]
        case "add" if isinstance(value, dict):
            value[draw(some.sampled_from(WORDS))] = draw(values)
        case "add":
            value.insert(place, value[place])
    return value


def settings_of(names: tuple[str, ...]) -> Any:
    """Objects with some of these keys, and now and then a different one."""
    keys = some.sampled_from(names) | some.sampled_from(WORDS)
    return some.dictionaries(keys, values | some.dictionaries(keys, values, max_size=5), max_size=5)


def text_of(value: Any) -> str:
    """JSON, or what comes nearest to it: NaN, numbers and depths that JSON does not allow."""
    try:
        return json.dumps(value)
    except ValueError:  # Python prints no number of more than 4,300 digits
        return '{"min_seq_len": ' + "9" * 5000 + "}"
    except RecursionError:
        return '{"method": ' + "[" * DEPTH + "]" * DEPTH + "}"


@some.composite
def documents(draw: Callable[..., Any], content: Any) -> bytes:
    """Bytes of a JSON document, whole or spoilt."""
    text = text_of(draw(content))
    if text.startswith("{") and draw(some.integers(0, 9)) == 0:  # a key that occurs twice
        text = text[:-1] + "," + text[1:]
    raw = text.encode(errors="surrogatepass")
    return draw(spoilt(raw))


@some.composite
def spoilt(draw: Callable[..., Any], raw: bytes) -> bytes:
    """Mostly the bytes as they are; else cut, mixed up, or in another encoding."""
    at = draw(some.integers(0, len(raw)))
    junk = draw(
        some.sampled_from((b"\0", b"\xff", b"\xed\xa0\x80", b"\xc3(", b"\xef\xbb\xbf", b"\n", b"\r", b"[" * 5000))
    )
    kind = draw(some.sampled_from(("whole",) * 6 + ("cut", "insert", "front", "behind", "utf-16", "junk", "brackets")))
    match kind:
        case "cut":
            return raw[:at]
        case "insert":
            return raw[:at] + junk + raw[at:]
        case "front":
            return junk + raw
        case "behind":
            return raw + junk
        case "utf-16":
            return raw.decode(errors="replace").encode("utf-16")
        case "junk":
            return draw(some.binary(max_size=200))
        case "brackets":
            return draw(some.sampled_from((b"[", b'{"a":', b"-", b"9", b'"', b"\n", b" "))) * 100_000
    return raw


SECRET = f"{CANARY} is what the prompt says"
