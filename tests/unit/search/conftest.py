# SPDX-License-Identifier: Apache-2.0
"""What tests of the search share."""

from collections.abc import Iterator
from typing import Any

import pytest

from minference_vllm import ops


@pytest.fixture(scope="module")
def short_prompts_drop_as_much() -> Iterator[None]:
    """Let the default settings drop as much of a short prompt as of a long one: short ones are quick to test."""

    def select_groups(*arguments: Any) -> None:
        masses, chunk, share, rows, sinks, local, _, *others = arguments
        select(masses, chunk, share, rows, sinks, local, 0, *others)

    select = ops.select_groups
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "select_groups", select_groups)
        yield
