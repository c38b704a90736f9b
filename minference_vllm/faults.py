# SPDX-License-Identifier: Apache-2.0
"""Exceptions of the sparse path: how they are logged and counted, and when the sparse path is given up."""

import logging
import traceback

from minference_vllm.errors import printable

MOST_FAULTS = 3
"""After this many faults in a row the sparse path is not tried again."""

logger = logging.getLogger("vllm.minference")


class Faults:
    """Counts and logs the exceptions of one engine on this worker.

    All exceptions are counted. Of those with the same kind, type and lines of code in their tracebacks, only the first
    is logged. Code that catches an exception must report it here from inside its `except` block.

    Args:
        raises: whether exceptions are raised again instead (the setting `debug`).

    Attributes:
        total: how many exceptions there were.
        is_broken: whether the sparse path is given up: all runs dense until the next start.
    """

    def __init__(self, raises: bool) -> None:
        self._raises = raises
        self.total = 0
        self.is_broken = False
        self._in_a_row = 0  # faults since a chunk last ran sparse
        self._told: set[tuple[object, ...]] = set()

    def in_start(self, error: Exception) -> None:
        """Report that sparse attention over made-up keys has failed, before the first request."""
        if self._is_new("start", error):
            logger.exception(
                "MInference: sparse attention cannot run here, and all runs dense: %s. Run minference-vllm doctor, and "
                'start the server again, with another "kernel" if that is what fails.',
                printable(str(error) or type(error).__name__),
            )
        self.is_broken = True

    def in_plan(self, error: Exception) -> None:
        """Report that a step could not be planned."""
        if self._is_new("plan", error):
            logger.exception("MInference: a step could not be planned; it runs dense.")
        self._extend_row()

    def in_layer(self, error: Exception, number: int) -> None:
        """Report that sparse attention of a chunk has failed in the layer of this number."""
        if self._is_new("layer", error):
            logger.exception("MInference: sparse attention failed in layer %d; its rows run dense.", number)
        self._extend_row()

    def in_account(self, error: Exception) -> None:
        """Report that measurements could not be copied from the device. No rows ran dense because of it."""
        if self._is_new("account", error):
            logger.exception(
                "MInference cannot read what sparse attention measured: density, recall and times stand still in the "
                "metrics until the server is started again. Serving goes on."
            )

    def end_row(self) -> None:
        """Note that a chunk has run sparse: faults in a row are counted from 0 again."""
        self._in_a_row = 0

    def _is_new(self, kind: str, error: Exception) -> bool:
        """Count an exception, and return whether it has not been logged yet."""
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
