# SPDX-License-Identifier: Apache-2.0
"""Exceptions that the plugin met: what is said of them, and when the sparse path is given up."""

import logging
import traceback

from minference_vllm.errors import printable

MOST_FAULTS = 3
"""Faults of the sparse path, one after the other, after which it is not tried again."""

logger = logging.getLogger("vllm.minference")


class Faults:
    """Exceptions of one engine on this worker. Each is logged once, with its traceback: of its kind and type from
    the same place; all are counted.

    Those who handle an exception tell it here, inside their `except`.

    Args:
        raises: whether exceptions are raised again instead: the setting `debug`.

    Attributes:
        total: how many there were.
        is_broken: whether the sparse path is given up: all runs dense until the next start.
    """

    def __init__(self, raises: bool) -> None:
        self._raises = raises
        self.total = 0
        self.is_broken = False
        self._in_a_row = 0  # since a chunk last ran sparse
        self._told: set[tuple[object, ...]] = set()

    def in_start(self, error: Exception) -> None:
        """Sparse attention of made-up keys has failed, before the first request."""
        if self._is_new("start", error):
            logger.exception(
                "MInference: sparse attention cannot run here, and all runs dense: %s. Run minference-vllm doctor, and "
                'start the server again, with another "kernel" if that is what fails.',
                printable(str(error) or type(error).__name__),
            )
        self.is_broken = True

    def in_plan(self, error: Exception) -> None:
        """A step could not be planned."""
        if self._is_new("plan", error):
            logger.exception("MInference: a step could not be planned; it runs dense.")
        self._extend_row()

    def in_layer(self, error: Exception, number: int) -> None:
        """Sparse attention of a chunk has failed in the layer of this number."""
        if self._is_new("layer", error):
            logger.exception("MInference: sparse attention failed in layer %d; its rows run dense.", number)
        self._extend_row()

    def in_account(self, error: Exception) -> None:
        """What was measured could not be brought from the device. Nothing ran dense for it."""
        if self._is_new("account", error):
            logger.exception(
                "MInference cannot read what sparse attention measured: density, recall and times stand still in the "
                "metrics until the server is started again. Serving goes on."
            )

    def end_row(self) -> None:
        """A chunk has run sparse."""
        self._in_a_row = 0

    def _is_new(self, kind: str, error: Exception) -> bool:
        """Count an exception; whether it has not been logged yet."""
        if self._raises:
            raise error
        self.total += 1
        frames = traceback.walk_tb(error.__traceback__)
        told = kind, type(error), *((frame.f_code.co_filename, line) for frame, line in frames)
        is_new = told not in self._told
        self._told.add(told)
        return is_new

    def _extend_row(self) -> None:
        self._in_a_row += 1
        if self._in_a_row == MOST_FAULTS:
            self.is_broken = True
            logger.error(
                "MInference: sparse attention failed %d times in a row. All runs dense until the server is started "
                'again. The setting "debug": true raises the exception instead.',
                MOST_FAULTS,
            )
