# SPDX-License-Identifier: Apache-2.0
"""What the package can raise, or log as a warning or an error, read from its source."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).parents[2] / "minference_vllm"
LOGGED = {"warning", "error", "exception"}
PLACEHOLDER = re.compile(r"%[-.\d]*[sdrf]|\{\w+\}")
WORD = re.compile("[A-Za-z]{2,}")
FEWEST_WORDS = 3  # with fewer, a string is no part of a sentence that would tell it from others

# Functions that give sentences, or parts of them, for others to raise or log.
SAYING = {
    "config._describe",
    "config._sentence",
    "config.misplaced",
    "kernels.cuda.library._open",
    "ops.kernel._cuda_obstacle",
    "ops.kernel._gpu_obstacle",
    "budget.gate_obstacle",
    "budget.sharing_obstacle",
}
# Where one of these sentences, or a whole exception, is passed on; nothing is added there.
FORWARDING = {
    "cli.arguments.Parser.error",
    "config.load_config",
    "impl.SparseLayerMixin.decide",
    "impl.runtime_of",
    "kernels.cuda.library.enqueue",
    "metadata.PlanningMixin.attach_layers",
}


class Message(NamedTuple):
    """One message.

    Attributes:
        place: dotted name of the function that gives it, from the package on.
        constant: the longest part of it that is always the same; empty if all is passed on from elsewhere.
    """

    place: str
    constant: str


def messages() -> Iterator[Message]:
    """All messages of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        for place, function in _functions(ast.parse(path.read_text()), module):
            if place in SAYING:
                yield from (Message(place, text) for text in _sentences(function))
            yield from (Message(place, _constant(said, function)) for said in _said(function))


def _functions(node: ast.AST, place: str) -> Iterator[tuple[str, ast.AST]]:
    """Every function, methods and nested ones included, under its dotted name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            name = f"{place}.{child.name}"
            if isinstance(child, ast.FunctionDef):
                yield name, child
            yield from _functions(child, name)
        else:
            yield from _functions(child, place)


def _own_nodes(function: ast.AST) -> Iterator[ast.AST]:
    """What a function holds, without what functions in it hold."""
    for child in ast.iter_child_nodes(function):
        if not isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield child
            yield from _own_nodes(child)


def _said(function: ast.AST) -> Iterator[ast.expr]:
    """What a function raises or logs; an exception raised again is nothing new."""
    for node in _own_nodes(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            # pydantic's exception takes a name first.
            yield node.exc.args[-2] if ast.unparse(node.exc.func) == "PydanticCustomError" else node.exc.args[0]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOGGED:
            yield node.args[0]


def _sentences(function: ast.AST) -> Iterator[str]:
    """The strings of a function that are whole sentences or nearly."""
    docstring = ast.get_docstring(function, clean=False) if isinstance(function, ast.FunctionDef) else None
    inside = {id(part) for node in _own_nodes(function) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in _own_nodes(function):
        if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in inside:
            parts = _parts(node, function)
            if parts != [docstring] and _is_telling(longest := max(parts, key=len, default="")):
                yield longest.strip()


def _constant(said: ast.expr, function: ast.AST) -> str:
    longest = max(_parts(said, function), key=len, default="")
    return longest.strip() if WORD.search(longest) else ""


def _is_telling(text: str) -> bool:
    return len(WORD.findall(text)) >= FEWEST_WORDS


def _parts(said: ast.AST, function: ast.AST) -> list[str]:
    """The constant parts of a message; names stand for what the function gives them."""
    if isinstance(said, ast.Constant):
        return PLACEHOLDER.split(said.value) if isinstance(said.value, str) else []
    if isinstance(said, ast.JoinedStr):
        return [part for value in said.values if isinstance(value, ast.Constant) for part in _parts(value, function)]
    if isinstance(said, ast.BinOp):
        return _parts(said.left, function) + _parts(said.right, function)
    if isinstance(said, ast.Name):
        given = [
            node.value
            for node in _own_nodes(function)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == said.id
        ]
        return [part for value in given for part in _parts(value, function)]
    return []
