# SPDX-License-Identifier: Apache-2.0
"""A tape records what one layer launches for a chunk, and other layers repeat it with their own tensors.

To check, divide and describe a chunk's tensors takes the host longer than to launch the kernels. All layers of a step
read the same rows over caches that are laid out alike, so their launches differ in the addresses of a layer's own
tensors alone. The first layer's launches are recorded with the places of these addresses.

Every launch on the sparse path must go through `library.launch`, `on_grid` (kernels/triton/launch.py) or `act`: what
does not is not repeated.
"""

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol, TypeVar

import torch

Returned = TypeVar("Returned")
Own = Sequence[torch.Tensor | None]
"""The tensors that belong to one layer alone, in an order that is the same for all layers."""

_recording = threading.local()


class Place(NamedTuple):
    """An address in one of a layer's own tensors.

    Attributes:
        number: of the tensor in Own.
        offset: from its first element, in bytes.
    """

    number: int
    offset: int

    def address(self, own: Own) -> int:
        """The address of this place in another layer's tensors."""
        tensor = own[self.number]
        assert tensor is not None
        return tensor.data_ptr() + self.offset


class Launch(Protocol):
    """A recorded launch."""

    def repeat(self, own: Own) -> None:
        """Launch the same with the tensors of another layer."""


class Action(NamedTuple):
    """Work on tensors that all layers share."""

    act: Callable[[], object]

    def repeat(self, own: Own) -> None:
        self.act()


class Tape:
    """The launches of one layer.

    Args:
        own: the tensors of the layer that is recorded.

    Attributes:
        is_ambiguous: whether two of these tensors overlap. An address may then belong to either, which nobody can know:
            the tape cannot be repeated.
    """

    def __init__(self, own: Own) -> None:
        self._spans = [_span(tensor) for tensor in own]
        in_order = sorted(filter(None, self._spans), key=lambda span: span.start)
        self.is_ambiguous = any(one.stop > next_one.start for one, next_one in itertools.pairwise(in_order))
        self._launches: list[Launch] = []

    def add(self, launch: Launch) -> None:
        self._launches.append(launch)

    def find(self, address: int) -> Place | None:
        """The place of an address; None if it is in no tensor of the layer's own, so that all layers share it."""
        for number, span in enumerate(self._spans):
            if address in span:
                return Place(number, address - span.start)
        return None

    def repeat(self, own: Own) -> None:
        """Launch the same for a layer whose own tensors have the same shapes, strides, dtypes and alignment."""
        for launch in self._launches:
            launch.repeat(own)


def current_tape() -> Tape | None:
    """The tape that records this thread's launches."""
    return getattr(_recording, "tape", None)


@contextmanager
def recording(tape: Tape) -> Iterator[None]:
    """Record this thread's launches."""
    _recording.tape = tape
    try:
        yield
    finally:
        _recording.tape = None


def act(function: Callable[[], Returned]) -> Returned:
    """Call a function that works on tensors which all layers share, and whose result nobody needs to know."""
    if (tape := current_tape()) is not None:
        tape.add(Action(function))
    return function()


def _span(tensor: torch.Tensor | None) -> range:
    """The addresses of a tensor's elements."""
    if tensor is None or not tensor.numel():
        return range(0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return range(start, start + (last + 1) * tensor.element_size())
