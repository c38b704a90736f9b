# SPDX-License-Identifier: Apache-2.0
"""What is said of the exceptions that the plugin meets while it serves."""

import pytest

from minference_vllm.faults import MOST_FAULTS, Faults


def meet(met: Faults, kind: type[Exception], elsewhere: bool = False) -> None:
    try:
        if elsewhere:
            raise kind("from another place")
        raise kind("from one place")
    except Exception as error:
        met.in_layer(error, 3)


def test_an_exception_is_logged_once_and_another_too(log_lines: list[tuple[str, str]]) -> None:
    met = Faults(raises=False)
    for kind, elsewhere in [(MemoryError, False), (MemoryError, False), (ValueError, False), (ValueError, True)]:
        meet(met, kind, elsewhere)
        met.end_row()
    assert log_lines == [("ERROR", "MInference: sparse attention failed in layer 3; its rows run dense.")] * 3
    assert met.total == 4 and not met.is_broken


def test_what_ends_the_sparse_path_has_been_logged(log_lines: list[tuple[str, str]]) -> None:
    met = Faults(raises=False)
    meet(met, MemoryError)
    met.end_row()
    for _ in range(MOST_FAULTS):
        meet(met, ValueError)
    assert met.is_broken and len(log_lines) == 3 and "3 times in a row" in log_lines[-1][1]


def test_debug_raises_what_was_met(log_lines: list[tuple[str, str]]) -> None:
    with pytest.raises(ValueError, match="one place"):
        meet(Faults(raises=True), ValueError)
    assert log_lines == []
